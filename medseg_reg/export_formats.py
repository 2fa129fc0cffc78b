"""The formats of an export, by name; apart, so that the command line knows them at once."""

from __future__ import annotations

from typing import Literal, get_args

Format = Literal["onnx", "torchscript", "pt2", "monai-bundle"]
FORMATS: tuple[Format, ...] = get_args(Format)
