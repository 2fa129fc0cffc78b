"""MONAI bundles in tests: run, checked against MONAI's schema, and read for code that they hold.

A bundle's configuration is code: what begins with `$` is evaluated as Python, with `@name` for
another part of it. Inference bundles of MONAI's model zoo need few kinds of it: they import `glob`
and list files, join paths, choose a device, load and move the network, and run the evaluator.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# What MONAI asks of metadata: https://project-monai.github.io/schema/meta_schema_20240725.json
TEXT = {"type": "string"}
TENSOR = {
    "type": "object",
    "properties": {
        "type": TEXT,
        "format": TEXT,
        "num_channels": {"type": "integer"},
        "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}},
        "dtype": TEXT,
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object"},
    },
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
}
TENSORS = {"type": "object", "additionalProperties": TENSOR}
TEXTS = (
    "schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description",
    "authors", "copyright", "data_source", "data_type", "image_classes", "label_classes",
    "pred_classes", "intended_use",
)  # fmt: skip
OBJECTS = ("changelog", "required_packages_version", "eval_metrics", "supported_apps")
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2019-09/schema",
    "type": "object",
    "properties": {
        **dict.fromkeys(TEXTS, TEXT),
        **{key: {"type": "object"} for key in OBJECTS},
        "references": {"type": "array", "items": TEXT},
        "network_data_format": {
            "type": "object",
            "properties": {"inputs": TENSORS, "outputs": TENSORS},
            "required": ["inputs", "outputs"],
        },
    },
    "required": [*TEXTS[:9], "required_packages_version", "network_data_format"],
}
REFERENCE = "reference_"
# What may be called, and what may be read, as they are written.
CALLED = {"list", "sorted", "glob.glob", "torch.device", "torch.cuda.is_available"}
CALLED |= {"torch.jit.load", f"{REFERENCE}network_def.to", f"{REFERENCE}evaluator.run"}
CALLED |= {"image.convert"}  # of Pillow; `image` is the argument of a lambda
READ = {"numpy.uint8"}
SHAPES = (
    ast.Expression,
    ast.Constant,
    ast.BinOp,
    ast.Add,
    ast.IfExp,
    ast.Dict,
    ast.Load,
    ast.Store,
)
SHAPES += (ast.ListComp, ast.comprehension, ast.keyword, ast.Lambda, ast.arguments, ast.arg)


def bundle_of(run: Path) -> Path:
    return run / "export" / "tiny_bundle"


def run_bundle(folder: Path, inputs: Path, output: Path) -> None:
    pytest.importorskip("ignite", reason="MONAI's evaluator needs pytorch-ignite")
    from monai.bundle import run

    run(
        config_file=str(folder / "configs/inference.json"),
        bundle_root=str(folder),
        dataset_dir=str(inputs),
        output_dir=str(output),
        device="$torch.device('cpu')",
    )


def expressions(content: Any) -> Iterator[str]:
    """Yield everything that MONAI would evaluate in a configuration."""
    if isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from expressions(value)
    elif isinstance(content, str) and content.startswith("$"):
        yield content


def require_harmless(expression: str) -> None:
    """Fail unless an expression is made of the few names, calls and shapes that are allowed.

    Raises:
        AssertionError: names what else is in it.
    """
    source = re.sub(r"@(\w+)", rf"{REFERENCE}\1", expression.removeprefix("$"))
    if source == "import glob":
        return
    tree = ast.parse(source, mode="eval")
    bound = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    bound |= {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    assert bound <= {"image", "i"}, f"{expression}: binds {bound}"
    _require(tree, expression)


def _require(node: ast.AST, expression: str) -> None:
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        assert name in CALLED, f"{expression}: calls {name}"
        for part in (*node.args, *node.keywords):
            _require(part, expression)
    elif isinstance(node, ast.Attribute):
        name = ast.unparse(node)
        assert name in READ, f"{expression}: reads {name}"
    elif isinstance(node, ast.Name):
        known = node.id in ("i", "image") or node.id.startswith(REFERENCE)
        assert known, f"{expression}: names {node.id}"
    else:
        assert isinstance(node, SHAPES), f"{expression}: has {type(node).__name__}"
        text = getattr(node, "value", None)
        assert not isinstance(text, str) or ".." not in text, f"{expression}: leaves its folder"
        for part in ast.iter_child_nodes(node):
            _require(part, expression)
