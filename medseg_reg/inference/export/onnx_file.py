"""The network as an .onnx file, run by ONNX Runtime."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from medseg_reg.errors import MedsegError
from medseg_reg.inference.export.plan import Plan

# Older ones lack operators that torch writes; newer ones are refused by more programs. Both numbers
# belong to ONNX 1.13 (December 2022).
OPSET, FORMAT = 18, 8
LARGEST = 2_000_000_000  # bytes that one protobuf message may have
NEEDED = ("onnx", "onnxscript", "onnxruntime")


def require_packages() -> None:
    """Refuse to go on where a package is missing, before anything is computed.

    Raises:
        MedsegError: names the packages and what installs them.
    """
    missing = []
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise MedsegError(
            f"--format onnx: needs {', '.join(missing)}, not installed. "
            "pip install 'medseg-reg[export]'"
        )


def write_onnx(program: ExportedProgram, plan: Plan, path: Path, metadata: str) -> None:
    """Write a program with its metadata into one file, and check it by ONNX's rules.

    Raises:
        MedsegError: the weights are too large for one file.
    """
    import onnx

    size = sum(value.numel() * value.element_size() for value in program.state_dict.values())
    if size > LARGEST:
        raise MedsegError(
            f"--format onnx: the weights have {size / 1e9:.1f} GB, one file holds 2. Use "
            "--format pt2."
        )
    made = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["logits"],
    )
    if made is None:
        raise RuntimeError("torch.onnx.export gave no program")
    made.save(path, external_data=False)
    model = onnx.load(path)
    model.ir_version = FORMAT
    for node in model.graph.node:
        node.ClearField("metadata_props")  # where it stood in the source: paths of this machine
    _name_axes(model.graph, plan)
    onnx.helper.set_model_props(model, {"medseg_reg": metadata})
    model.doc_string = "Logits (batch, classes, rows, columns) of images with values from 0 to 1."
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def open_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """Return the file as a function that ONNX Runtime computes on the processor."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"image": x.numpy()})[0])


def _name_axes(graph: Any, plan: Plan) -> None:
    """Call the free axes by their names, which torch calls s77 and the like."""
    axes = graph.input[0].type.tensor_type.shape.dim
    wanted = {0: "batch", 2: "rows", 3: "columns"} if plan.dynamic else {0: "batch"}
    names = {axes[number].dim_param: name for number, name in wanted.items()}
    for value in _values(graph):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = re.sub(
                    r"\w+", lambda word: names.get(word[0], word[0]), axis.dim_param
                )


def _values(graph: Any) -> Iterable[Any]:
    return (*graph.input, *graph.output, *graph.value_info)
