"""Trained networks for other programs: ONNX, TorchScript, torch.export, MONAI bundles."""

from medseg_reg.export_formats import FORMATS, Format
from medseg_reg.inference.export.run import Exported, export_run

__all__ = ["FORMATS", "Exported", "Format", "export_run"]
