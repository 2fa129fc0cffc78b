"""Bad input that is found before the first checkpoint leaves no run behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from medseg_reg.config import parse_config
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.fit import fit
from medseg_reg.errors import MedsegError
from tests.stores import make_store
from tests.training import tiny_config


@pytest.fixture
def store(tmp_path: Path) -> SliceStore:
    return make_store(tmp_path / "store", cases=6, slices=3, size=32)


def refused(store: SliceStore, run: Path, **changes: object) -> str:
    with pytest.raises(MedsegError) as error:
        fit(parse_config(tiny_config(store.path, run, **changes), "test"))
    assert not run.exists()
    return str(error.value)


def test_a_sampling_policy_that_the_data_cannot_serve(store: SliceStore, tmp_path: Path) -> None:
    # Every slice of this store has foreground.
    wanted = {"policy": "balanced"}
    assert "policy 'balanced'" in refused(store, tmp_path / "run", data__sampling=wanted)
    fit(parse_config(tiny_config(store.path, tmp_path / "run", training__epochs=1), "test"))


def test_a_truncated_array(store: SliceStore, tmp_path: Path) -> None:
    path = sorted((store.path / "masks").glob("*.npy"))[0]
    path.write_bytes(path.read_bytes()[:-7])
    assert path.name in refused(store, tmp_path / "run")


def test_a_run_killed_while_it_wrote_its_configuration_goes_on(
    store: SliceStore, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".config.x1y2z3.yaml").write_text("name: ti")
    fit(parse_config(tiny_config(store.path, run, training__epochs=1), "test"))
    assert (run / "weights.safetensors").exists()


def test_a_disk_that_is_too_small(
    store: SliceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "MB are needed and 0.0 MB are free" in refused(store, tmp_path / "run")


def test_a_training_that_fails_in_its_first_epoch_can_be_repaired_and_repeated(
    store: SliceStore, tmp_path: Path
) -> None:
    fast = {"optimizer__lr": 1e30, "schedule": {"name": "constant"}, "training__precision": "32"}
    assert "not" in refused(store, tmp_path / "run", **fast)
    fit(parse_config(tiny_config(store.path, tmp_path / "run", training__epochs=1), "test"))


def test_class_weights_that_are_all_zero(store: SliceStore, tmp_path: Path) -> None:
    message = refused(store, tmp_path / "run", regularization__error__class_weights=[0, 0])
    assert "class_weights" in message
