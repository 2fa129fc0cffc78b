"""Bad input ends a command with a message of one to three lines and exit code 2."""

from __future__ import annotations

import errno
import io
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from medseg_reg import evaluate, predict, train
from medseg_reg.data import verify
from medseg_reg.errors import run_main
from tests.stores import make_store
from tests.training import tiny_config, write_config


class Outcome(NamedTuple):
    code: int
    text: str


@pytest.fixture
def run_command(monkeypatch, capsys) -> Callable[..., Outcome]:
    """Run a command's main as the shell would."""

    def run(main: Callable[[Sequence[str]], None], *arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run_main(main)
        return Outcome(int(end.value.code or 0), capsys.readouterr().err)

    return run


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "store", cases=6, slices=3, size=32).path


@pytest.fixture
def fails(run_command, store, tmp_path) -> Callable[..., str]:
    """Train with changed settings; return the message, after checking that it is a good one."""

    def run(*overrides: str, **changes: Any) -> str:
        content = tiny_config(store, tmp_path / "run", **changes)
        config = write_config(tmp_path / "c.yaml", content)
        outcome = run_command(train.main, "--config", config, *overrides)
        assert outcome.code == 2, outcome.text
        assert outcome.text.startswith("error: ")
        assert 1 <= len(outcome.text.strip().split("\n")) <= 3, outcome.text
        return outcome.text

    return run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rate=1", "unknown key 'optimizer.learning_rate'"),
        ("data.imag={}", "unknown key 'data.imag'. Did you mean 'image'?"),
        ("optimizer.lr=-1", "'optimizer.lr'"),
        ("training.epochs=many", "'training.epochs'"),
        ("optimizer.name=adm", "Did you mean 'adam'?"),
        ("regularization.architecture.0.name=spatial_dropot", "spatial_dropout"),
        ("regularization.architecture.0.q=1", "q"),
        ("regularization.architecture.0.places=betwen_convs", "between_convs"),
        ("regularization.architecture.0.p=1.5", "1.5"),
        ("regularization.data.0.name=Rotat", "Rotate"),
        ("regularization.error.class_weights=[1]", "1 weights for 2 classes"),
        ("training.precision=16", "float16 does not work on a CPU"),
        ("data.image.size=[4, 4]", "data.image.size"),
        ("data.split={kind: counts, train: 9, val: 1, test: 1}", "6"),
        ("data.split={kind: fractions, train: 0.9, val: 0.0, test: 0.1}", "val"),
        ("data.split={kind: file, file: nowhere.json}", "nowhere.json"),
    ],
)
def test_a_wrong_setting_names_its_key(fails, override, message, tmp_path):
    assert message in fails(override)
    assert not (tmp_path / "run").exists()


def test_a_missing_store_says_which_command_makes_one(fails, tmp_path):
    text = fails(f"data.store={tmp_path / 'nowhere'}")
    assert "python -m data_prep.pancreas_ct" in text
    assert "nowhere" in text


def test_a_missing_configuration_is_named(run_command, tmp_path):
    outcome = run_command(train.main, "--config", tmp_path / "no.yaml")
    assert outcome.code == 2
    assert "no.yaml: does not exist" in outcome.text


def test_one_case_only_cannot_be_split(fails, tmp_path):
    one = make_store(tmp_path / "one", cases=1, slices=3, size=32).path
    assert "1" in fails(f"data.store={one}", "data.split={kind: fractions}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_a_truncated_array_is_named(fails, store, folder, tmp_path):
    for file in (store / folder).iterdir():
        file.write_bytes(file.read_bytes()[:300])
    assert f"{folder}/case_0" in fails()
    assert not (tmp_path / "run" / "weights.safetensors").exists()


def test_an_array_that_would_run_code_is_refused(fails, store):
    for file in (store / "images").iterdir():
        np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    assert "images/case_0" in fails()


def test_a_damaged_manifest_is_named(fails, store):
    (store / "manifest.json").write_text("{")
    assert "manifest.json: is not valid JSON" in fails()


def test_integers_without_a_window_ask_for_one(fails, tmp_path):
    scan = make_store(tmp_path / "ct", cases=6, slices=3, size=32, dtype="int16").path
    assert "needs a `window`" in fails(f"data.store={scan}")


def test_a_folder_of_other_files_is_not_touched(fails, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert "is not a run directory" in fails()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_folder_that_cannot_be_written_is_named(fails, monkeypatch, tmp_path):
    import tempfile

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert "cannot be written to" in fails()


def test_too_small_a_disk_is_noticed_before_the_training(fails, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "are needed" in fails()


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_whole(fails, monkeypatch, tmp_path):
    save, calls = Path.write_bytes, []

    def full(self: Path, data: bytes) -> int:
        if "last" in self.name:
            calls.append(self)
            if len(calls) == 2:
                save(self, bytes(data)[:100])
                raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return save(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "no space is left" in fails()
    folder = tmp_path / "run" / "checkpoints"
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]
    assert torch.load(folder / "last.ckpt", weights_only=True)["epoch"] == 0


def test_damaged_checkpoints_alone_are_an_error(fails, tmp_path, store):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    content = tiny_config(store, tmp_path / "run")
    from medseg_reg.config import parse_config

    (tmp_path / "run" / "config.yaml").write_text(parse_config(content, "x").to_yaml())
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(100)}, buffer)
    (folder / "last.ckpt").write_bytes(buffer.getvalue()[:200])
    assert "last.ckpt: cannot be read as a checkpoint" in fails()


@pytest.mark.parametrize("main", [evaluate.main, predict.main])
def test_a_folder_that_is_no_run_says_what_makes_one(run_command, main, tmp_path):
    more = () if main is evaluate.main else ("--input", tmp_path, "--output", tmp_path / "o")
    outcome = run_command(main, "--run", tmp_path, *more)
    assert outcome.code == 2
    assert "is not a run directory" in outcome.text


def test_damaged_weights_are_named(run_command, store, tmp_path):
    config = write_config(tmp_path / "c.yaml", tiny_config(store, tmp_path / "run"))
    train.main(["--config", str(config)])
    weights = tmp_path / "run" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    outcome = run_command(evaluate.main, "--run", tmp_path / "run")
    assert outcome.code == 2
    assert "weights.safetensors: does not hold the weights" in outcome.text


def test_verify_names_each_changed_file(run_command, store, capsys):
    mask = np.load(store / "masks" / "case_03.npy")
    mask[0, 0, 0] = 9
    np.save(store / "masks" / "case_03.npy", mask)
    outcome = run_command(verify.main, store)
    assert outcome.code == 2
    assert "case_03" in outcome.text


def test_a_manifest_cannot_point_outside_its_store(fails, store):
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["cases"][0]["name"] = "../../etc/passwd"
    (store / "manifest.json").write_text(json.dumps(manifest))
    assert "manifest.json: cases.0.name" in fails()


def test_a_label_outside_the_classes_names_the_slices(fails, store):
    for file in (store / "masks").iterdir():
        mask = np.load(file)
        mask[:, 0, 0] = 9
        np.save(file, mask)
    assert "case_0" in fails()


def test_a_changed_mask_is_named_by_the_evaluation(run_command, store, tmp_path):
    config = write_config(tmp_path / "c.yaml", tiny_config(store, tmp_path / "run"))
    train.main(["--config", str(config)])
    (tmp_path / "run" / "summary.json").unlink()
    for file in (store / "masks").iterdir():
        np.save(file, np.full_like(np.load(file), 9))
    outcome = run_command(evaluate.main, "--run", tmp_path / "run")
    assert outcome.code == 2
    assert "masks/case_0" in outcome.text


@pytest.mark.parametrize(("name", "content"), [("data.json", "{}"), ("metrics.csv", "")])
def test_a_damaged_file_of_a_run_is_named(run_command, store, tmp_path, name, content):
    config = write_config(tmp_path / "c.yaml", tiny_config(store, tmp_path / "run"))
    train.main(["--config", str(config)])
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / name).write_text(content)
    outcome = run_command(evaluate.main, "--run", tmp_path / "run")
    assert outcome.code == 2
    assert name in outcome.text


def test_a_device_that_is_not_there_is_named(run_command, tmp_path):
    arguments = ("--run", tmp_path, "--input", tmp_path, "--output", tmp_path / "o")
    outcome = run_command(predict.main, *arguments, "--device", "cuda:99")
    assert outcome.code == 2
    assert "--device cuda:99: cannot be used" in outcome.text


@pytest.mark.parametrize("size", ["[32, 40]", "[16, 24]"])
def test_quarter_turns_of_slices_that_are_not_square_are_refused(fails, size):
    turning = "regularization.data=[{name: RandomRotate90}]"
    assert "need square slices" in fails(f"data.image.size={size}", turning)


def test_an_error_in_a_loader_process_is_told_as_in_this_one(fails, store, monkeypatch):
    from medseg_reg.data.dataset import SliceDataset

    calls, get = [], SliceDataset.__getitem__

    def broken_later(self, key):
        calls.append(key)
        if len(calls) > 3:
            from medseg_reg.errors import MedsegError

            raise MedsegError("images/case_01.npy: is damaged")
        return get(self, key)

    monkeypatch.setattr(SliceDataset, "__getitem__", broken_later)
    assert fails("data.workers=1") == "error: images/case_01.npy: is damaged\n"


def test_a_score_without_any_case_is_said_to_be_unknown():
    from medseg_reg.engine.run_directory import RunDirectory
    from medseg_reg.inference.evaluation import headline

    nothing = {"mean": None, "low": None, "n": 0}
    summary = {"dice": nothing, "iou": nothing, "part": "test", "notes": ["a part of it"]}
    assert headline(RunDirectory(Path("r")), summary) == (
        "note: a part of it\n"
        "test: no case could be scored; each class is empty in all of them\n"
        "run r\ntest DICE unknown"
    )
