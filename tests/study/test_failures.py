"""What failed stays written down until it has been tried again, and a late stop stops nothing."""

from __future__ import annotations

import signal
from pathlib import Path

import pandas as pd
import pytest

from medseg_reg.errors import EXIT_INTERRUPTED, Interrupted
from medseg_reg.study.failures import last_error
from medseg_reg.study.grid import expand
from medseg_reg.study.runner import run_cells
from medseg_reg.study.spec import StudySpec
from tests.study.studies import MadePool, study_of

# The runs of a tiny study, in their order.
RUNS = [f"blobs/unet/{method}/seed{seed}" for seed in (0, 1) for method in ("none", "dropout")]


@pytest.fixture
def study(tmp_path: Path) -> StudySpec:
    found = study_of(tmp_path / "store", tmp_path)
    found.directory.mkdir(parents=True)
    return found


def run(study: StudySpec, pool: MadePool) -> list[str]:
    return [one.spot.path for one in run_cells(study, expand(study), pool, lambda _: None)]


def failed(study: StudySpec) -> pd.DataFrame:
    """Return failures.csv, with the names of the runs as its index."""
    path = study.directory / "failures.csv"
    if not path.exists():
        return pd.DataFrame()
    table = pd.read_csv(path)
    names = table["log"].str.removeprefix("logs/").str.removesuffix(".log")
    return table.set_index(names)


def test_failures_stay_until_their_runs_have_ended_anew(study):
    assert run(study, MadePool(dict.fromkeys(RUNS, 1))) == RUNS
    assert set(failed(study).index) == set(RUNS)
    # Stopped after the first of them, which fails in another way now.
    with pytest.raises(Interrupted):
        run(study, MadePool({RUNS[0]: 3}, signal_at=RUNS[0]))
    table = failed(study)
    assert table["exit_code"].to_dict() == {RUNS[0]: 3, **dict.fromkeys(RUNS[1:], 1)}
    assert table["method"].tolist() == ["dropout", "dropout", "none", "none"]
    assert table["seed"].tolist() == [0, 1, 0, 1]
    # Those that succeed are gone, the others not.
    assert run(study, MadePool({RUNS[2]: 4})) == [RUNS[2]]
    assert failed(study)["exit_code"].to_dict() == {RUNS[2]: 4}
    assert run(study, MadePool()) == []
    assert not (study.directory / "failures.csv").exists()


def test_a_study_that_ends_before_any_run_does_keeps_what_failed(study, monkeypatch):
    run(study, MadePool({RUNS[1]: 1}))
    before = (study.directory / "failures.csv").read_bytes()
    pool = MadePool()
    monkeypatch.setattr(pool, "start", lambda job: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(study, pool)
    assert (study.directory / "failures.csv").read_bytes() == before


def test_a_failure_of_a_run_that_is_no_more_of_the_study_goes(study):
    run(study, MadePool(dict.fromkeys(RUNS, 1)))
    smaller = study.model_copy(update={"seeds": (0,)})
    run(smaller, MadePool({RUNS[0]: 1}))
    assert failed(study).index.tolist() == [RUNS[0]]


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "a\n1,2\n"])
def test_a_damaged_table_of_failures_is_written_anew(study, content):
    (study.directory / "failures.csv").write_text(content)
    run(study, MadePool({RUNS[0]: 1}))
    assert failed(study).index.tolist() == [RUNS[0]]


def test_a_stop_that_comes_when_all_runs_have_ended_stops_nothing(study):
    assert run(study, MadePool(signal_at=RUNS[-1])) == []
    assert run(study, MadePool({RUNS[-1]: 1}, signal_at=RUNS[-1])) == [RUNS[-1]]


@pytest.mark.parametrize("code", [EXIT_INTERRUPTED, -signal.SIGTERM])
def test_a_stop_that_reaches_the_last_run_is_told(study, code):
    with pytest.raises(Interrupted, match="3 of 4 runs have ended"):
        run(study, MadePool({RUNS[-1]: code}, signal_at=RUNS[-1]))


def test_a_failure_is_told_by_its_last_error(tmp_path):
    log = tmp_path / "log"
    log.write_text("epoch 1\nerror: data/store: does not exist.\nsome warning at the end\n")
    assert last_error(log, 2) == "error: data/store: does not exist."
    log.write_text("Traceback ...\n  x = 1 / 0\nZeroDivisionError: division by zero\n\n")
    assert last_error(log, 1) == "ZeroDivisionError: division by zero"
    assert last_error(tmp_path / "none", 1) == "ended with exit code 1 and said nothing"
    assert last_error(log, -9).startswith("killed by SIGKILL")


def test_a_signal_without_a_name_has_its_number(tmp_path):
    # Python names only the first and the last of the real-time signals.
    assert last_error(tmp_path / "log", -40) == "killed by signal 40"
