"""Each run of a study names a teacher, or weights, of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from medseg_reg.config import load_config
from medseg_reg.errors import MedsegError
from medseg_reg.study.grid import Spot, expand
from medseg_reg.study.placeholders import TEACHER, filled_sources
from tests.study.studies import study_of
from tests.training import tiny_config, write_config

PATH = "runs/studies/unet/runs/{dataset}/unet/none/fold{fold}/seed{seed}"


def cells(folder, teacher=PATH, **changes):
    methods = {"none": [], "distilled": {"overrides": {TEACHER: teacher}}}
    return expand(study_of(folder / "store", folder, methods=methods, **changes))


@pytest.mark.parametrize(
    ("parts", "path", "found"),
    [
        ({"folds": 3}, PATH, {f"fold{n}" for n in range(3)}),
        ({"splits": [4, 7]}, PATH.replace("fold", "split"), {"split4", "split7"}),
        ({}, PATH.replace("/fold{fold}", ""), {""}),
    ],
)
def test_a_run_learns_from_the_run_in_its_own_place(tmp_path, parts, path, found):
    taught = [c for c in cells(tmp_path, path, **parts) if c.spot.method == "distilled"]
    assert {cell.spot.part for cell in taught} == found
    for cell in taught:
        wanted = cell.path.replace("distilled", "none")
        error = cell.config.regularization.error
        assert error.distillation.teacher == Path("runs/studies/unet/runs") / wanted
    plain = [c for c in cells(tmp_path, path, **parts) if c.spot.method == "none"]
    assert all(cell.config.regularization.error.distillation is None for cell in plain)


def test_weights_of_a_network_and_of_a_file_are_filled_in_too_and_can_be_repeated(tmp_path):
    base = tiny_config(tmp_path / "store", tmp_path / "run")
    base["network"]["pretrained"] = "mae/{dataset}-{split}.safetensors"
    file = write_config(tmp_path / "base.yaml", base)
    networks = {"unet": {}, "own": {"pretrained": "{network}/{method}/{seed}.pt"}}
    found = expand(
        study_of(
            tmp_path / "store", tmp_path, datasets={"a": str(file)}, networks=networks, splits=[5]
        )
    )
    paths = {cell.path: str(cell.config.network.pretrained) for cell in found}
    assert paths["a/unet/none/split5/seed0"] == "mae/a-5.safetensors"
    assert paths["a/own/dropout/split5/seed1"] == "own/dropout/1.pt"
    assert all(load_config(file, cell.overrides) == cell.config for cell in found)


def test_the_encoder_of_a_foreign_network_has_weights_by_its_place():
    content = {"network": {"name": "smp.Unet", "encoder_weights": "w/{fold}.pt"}, "seed": 3}
    found = filled_sources(content, Spot("a", "unet", "none", 0, "fold2"))
    assert found == {"network.encoder_weights": "w/2.pt"}


def test_a_coarse_run_is_named_by_its_place_too():
    content = {"network": {"reuse": {"run": "coarse/{dataset}/seed{seed}"}}}
    found = filled_sources(content, Spot("a", "unet", "none", 3, ""))
    assert found == {"network.reuse.run": "coarse/a/seed3"}
    assert filled_sources({"network": {"pretrained": None}}, Spot("a", "b", "c", 0, "")) == {}


@pytest.mark.parametrize(
    ("path", "parts", "said"),
    [
        ("runs/{sed}", {}, r"there is no placeholder \{sed\}. Did you mean 'seed'\?"),
        ("runs/{seed.real}", {}, r"no placeholder \{seed.real\}"),
        ("runs/{}", {}, r"no placeholder \{\}"),
        ("runs/{fold}", {"splits": [1]}, r"\{fold\} needs 'folds' in the study"),
        ("runs/{split}", {"folds": 3}, r"\{split\} needs 'splits' in the study"),
    ],
)
def test_an_unknown_placeholder_is_refused_with_those_that_there_are(tmp_path, path, parts, said):
    known = r"Known here: \{dataset\}, \{network\}, \{method\}, \{seed\}"
    with pytest.raises(
        MedsegError, match=rf"run blobs/unet/distilled/.*{TEACHER}: .*{said}.*{known}"
    ):
        cells(tmp_path, path, **parts)
