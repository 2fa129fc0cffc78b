"""What a search writes is read as it is: by a study, and by a training."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import pytest
import yaml

from medseg_reg.config import load_config
from medseg_reg.errors import MedsegError
from medseg_reg.study.grid import expand
from medseg_reg.study.search.__main__ import run_search
from medseg_reg.study.search.found import write_best
from medseg_reg.study.search.spec import load_search
from medseg_reg.study.search.trials import grid_trials
from medseg_reg.study.spec import load_study
from tests.study.search.made_search import ScoringPool, search_of
from tests.study.studies import study_of

ROOT = Path(__file__).parents[3]


def write_only_trial(tmp_path: Path, **changes) -> Path:
    search = search_of(tmp_path / "store", tmp_path, **changes)
    write_best(search, next(grid_trials(search)), 0.5)
    return search.directory


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "studies.md").read_text("utf-8")
    section = page[page.index("## Search for rates") : page.index("## Ready studies")]
    command = re.search(r"study\.search --config (\S+)", section)[1]
    study = re.search(r"^```yaml\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[1]
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(study, encoding="utf-8")

    search = load_search(Path(command))
    search.directory.mkdir(parents=True)
    monkeypatch.setattr("medseg_reg.study.search.__main__._prepare", lambda _: None)
    # The middle one of the three rates is best.
    pool = ScoringPool(lambda c: [1 - abs(c.regularization.architecture[0].parameters["p"] - 0.1)])
    run_search(search, pool, lambda _: None)

    cells = {cell.spot.method: cell.config for cell in expand(load_study(Path("study.yaml")))}
    (layer,) = cells["heuristic"].regularization.architecture
    assert (layer.name, layer.places, layer.parameters["p"]) == (
        *("heuristic_dropout", ("between_convs",)),
        0.1,
    )
    # But for the layers, the seed and the place, a run of the study is the best one of the search.
    best = load_config(Path(re.search(r"--config (runs/\S+best.yaml)", section)[1]))
    update = {"run": best.run, "name": best.name, "seed": best.seed, "training": best.training}
    assert cells["heuristic"].model_copy(update=update) == best
    assert cells["none"].regularization.architecture == ()
    assert best.run_path == Path("runs/searches/demo/best/seed0")
    assert best.training.progress
    # The study can be repeated without the search.
    resolved = load_study(Path("study.yaml"))
    (tmp_path / "resolved.yaml").write_text(resolved.to_yaml(), encoding="utf-8")
    shutil.rmtree("runs")
    assert load_study(Path("resolved.yaml")) == resolved


def test_a_method_has_what_the_search_set_below_regularization_and_nothing_else(tmp_path):
    folder = write_only_trial(
        tmp_path,
        overrides={
            "regularization.error": {"dice": 2.0},
            "regularization.data.0.limit": 5,
            "regularization.architecture": [
                {"name": "heuristic_dropout", "p": 0.5},
                {"name": "corrdrop_channel", "temperature": math.inf, "schedule": "linear"},
            ],
            "training.epochs": 4,
        },
        parameters={
            "regularization.architecture.0.k": [3],
            "regularization.penalty.weight_decay": [1e-4],
            "optimizer.lr": [0.01],
        },
    )
    text = (folder / "method.yaml").read_text("utf-8")
    assert "for 'overrides' of the whole study: optimizer.lr: 0.01\n" in text
    method = yaml.safe_load(text)
    assert method["overrides"] == {
        "regularization.error.dice": 2.0,
        # The whole list: the file of another data set may have none, or another first entry.
        "regularization.data": [{"name": "Rotate", "limit": 5, "p": 0.5}],
        "regularization.penalty.weight_decay": 1e-4,
    }
    study = study_of(
        tmp_path / "store", tmp_path, methods={"none": [], "found": str(folder / "method.yaml")}
    )
    found = {cell.spot.method: cell.config.regularization for cell in expand(study)}["found"]
    best = load_config(folder / "best.yaml").regularization
    assert found == best
    assert found.architecture[0].parameters["k"] == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"'methods.a': .*method.yaml: does not exist"),
        ("layers: []\n", r"unknown key 'methods.a.layers'"),
        ("[{name: dropot}]\n", r"'methods.a.architecture.0': unknown .*'dropout'"),
        ("overrides: {optimizer.lr: 1}\n", r"optimizer.lr: a method may change keys below"),
    ],
)
def test_a_mistake_in_the_file_of_a_method_is_told(tmp_path, content, message):
    method, path = tmp_path / "method.yaml", tmp_path / "study.yaml"
    if content is not None:
        method.write_text(content)
    study = {"name": "s", "datasets": {"d": "d.yaml"}, "methods": {"none": [], "a": str(method)}}
    path.write_text(yaml.safe_dump(study))
    with pytest.raises(MedsegError, match=message):
        load_study(path)
