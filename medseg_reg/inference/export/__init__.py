"""Trained networks for other programs: ONNX, TorchScript, torch.export, MONAI bundles."""

from medseg_reg.inference.export.run import FORMATS, Exported, Format, export_run

__all__ = ["FORMATS", "Exported", "Format", "export_run"]
