"""What is exported of a run that takes in a coarse one holds both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from medseg_reg.data.store import SliceStore
from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.export_formats import Format
from medseg_reg.files import sha256_of
from medseg_reg.inference.export import export_run
from medseg_reg.inference.export.facts import facts_of
from medseg_reg.inference.export.program import open_pt2
from medseg_reg.inference.export.script import open_script
from tests.inference.export_runs import exportable_run
from tests.inference.made_runs import NOISY, PLAIN, make_run
from tests.stores import make_store

slow = pytest.mark.slow
HALF = {"data__image": {"size": [16, 20]}}
WHOLE = {"data__image": {"size": [32, 40]}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SliceStore:
    path = tmp_path_factory.mktemp("store") / "store"
    return make_store(path, cases=6, slices=1, size=(32, 40))


def exported(store: SliceStore, folder: Path, form: Format, scaled: bool, **more: Any) -> Any:
    """Return an exported run, and its network."""
    coarse = make_run(folder / "coarse", store, **PLAIN, **(HALF if scaled else {}))
    changes = {**NOISY, **(WHOLE if scaled else {}), "network__reuse": {"run": str(coarse), **more}}
    run = RunDirectory(exportable_run(folder / "run", store, seed=1, **changes))
    return export_run(run, form), load_run_network(run)


@pytest.mark.parametrize(
    ("form", "scaled", "what", "takes"),
    [
        ("torchscript", False, "logits", "any"),
        ("torchscript", True, "probabilities", "any, from 21 rows and columns"),
        pytest.param("pt2", True, "probabilities", "any, from 21 rows and columns", marks=slow),
        pytest.param("pt2", False, "logits", "any, from 3 rows and columns", marks=slow),
        pytest.param("onnx", False, "probabilities", "any", marks=slow),
        pytest.param("onnx", True, "probabilities", "any, from 21 rows and columns", marks=slow),
    ],
)
def test_it_gives_the_same_at_any_size(
    store: SliceStore, tmp_path: Path, form: Format, scaled: bool, what: str, takes: str
) -> None:
    done, network = exported(store, tmp_path, form, scaled, what=what)
    assert done.size == takes
    if form == "onnx":
        from medseg_reg.inference.export.onnx_file import open_onnx as opened
    else:
        opened = open_pt2 if form == "pt2" else open_script
    program = opened(done.path)
    for number, shape in enumerate(((1, 1, 32, 40), (3, 1, 47, 31), (2, 1, 24, 65))):
        x = torch.rand(shape, generator=torch.Generator().manual_seed(50 + number))
        with torch.inference_mode():
            torch.testing.assert_close(program(x), network(x), atol=1e-3, rtol=1e-4)


def test_a_file_says_what_it_holds_and_not_where_that_lay(
    store: SliceStore, tmp_path: Path
) -> None:
    coarse = make_run(tmp_path / "coarse", store, **PLAIN)
    more = {"network__reuse": {"run": str(coarse)}, **PLAIN}
    run = RunDirectory(exportable_run(tmp_path / "run", store, **more))
    about = facts_of(run)
    digest = sha256_of(coarse / "weights.safetensors")
    assert about["network"]["reuse"] == {"what": "probabilities", "weights_sha256": digest}
    assert str(tmp_path) not in json.dumps(about)


@slow
def test_a_bundle_takes_slices_of_their_own_size(store: SliceStore, tmp_path: Path) -> None:
    done, _ = exported(store, tmp_path, "monai-bundle", True)
    assert done.size == "any"
    assert done.difference < 1e-4
