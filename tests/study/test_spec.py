"""A study file says what it means, or what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from medseg_reg.errors import MedsegError
from medseg_reg.study.grid import expand
from medseg_reg.study.spec import StudySpec, load_study
from tests.study.studies import study_of, tiny_study

STUDIES = sorted((Path(__file__).parents[2] / "configs" / "studies").glob("*.yaml"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(tiny_study(tmp_path / "store", tmp_path)), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seedz=3", r"unknown key 'seedz'. Did you mean 'seeds'"),
        ("methods.none=[{name: dropout, p: 0.1}]", r"the baseline 'none' has a regularizer"),
        ("baseline=plain", r"no method is the baseline 'plain'. Add `plain: \[\]`"),
        ("methods.x=[{name: dropot}]", r"'methods.x.architecture.0': unknown .*'dropout'"),
        ("methods.x={overrides: {training.epochs: 9}}", r"training.epochs: a method may change"),
        ("methods.x={overrides: {regularization.architecture: []}}", r"stand in 'architecture'"),
        ("budget.epochs=0", r"'budget.epochs': input should be greater than or equal to 1"),
        ("datasets.blobs={}", r"'datasets.blobs': give a config"),
        ("datasets.blobs.networks=[vnet]", r"has 'vnet', which is none of the networks unet"),
        ("overrides={seed: 3}", r"'seed' is set for each run by the study"),
        ("seeds=[1, 1]", r"seeds: one number stands there twice"),
        ("seeds=0", r"'seeds': give a number of seeds, 1 or more, or a list"),
        ("seeds=many", r"'seeds': give a number of seeds"),
        ("methods.x=", r"'methods.x': nothing stands there"),
        ("metrics=[dise]", r"'metrics.0'.*Did you mean 'dice'"),
        ("metrics=[hd95]", r"DICE is the headline of the report; add 'dice'"),
        ("equal_rates=1", r"'equal_rates': input should be less than 1"),
        ("workers=yes", r"a switch is no number"),
        ("methods={none: [], 'a b': []}", r"a b"),
        ("methods.x={grid: {p: [0.1]}}", r"x.grid: there is no layer in x.architecture"),
        ("methods.x={architecture: [{name: dropout}], grid: {}}", r"x.grid: give lists"),
        ("methods.x={architecture: [{name: dropout}], grid: {p: 0.1}}", r"x.grid.p: give a list"),
        ("methods.x={architecture: [{name: dropout}], grid: {q: [1]}}", r"'q'"),
        ("methods.x={architecture: [{name: dropout}], grid: {p: [.1, .1]}}", r"name 'x-p0.1'"),
        ("methods.x={architecture: [{name: dropout, p: .2}], grid: {p: [.1]}}", r"'p' stands in"),
    ],
)
def test_a_mistake_is_told_with_its_key(file, override, message):
    with pytest.raises(MedsegError, match=message):
        load_study(file, [override])


def test_an_empty_file_is_told(file):
    file.write_text("# nothing yet\n")
    with pytest.raises(MedsegError, match=r"study.yaml: is empty"):
        load_study(file)


def test_a_mistake_in_the_file_is_told_with_its_line(file):
    file.write_text(file.read_text() + "workerz: 2\n")
    line = len(file.read_text().splitlines())
    with pytest.raises(MedsegError, match=rf"study.yaml:{line}: unknown key 'workerz'"):
        load_study(file)


def test_broken_yaml_is_told_with_its_file(file):
    file.write_text("name: [x\n")
    with pytest.raises(MedsegError, match=r"study.yaml:\d+: is not valid YAML"):
        load_study(file)


def test_a_resolved_study_reads_back_as_it_is(tmp_path):
    study = study_of(tmp_path / "store", tmp_path, equal_rates=0.2, coadaptation={"draws": 3})
    (tmp_path / "study.yaml").write_text(study.to_yaml())
    assert load_study(tmp_path / "study.yaml") == study
    assert StudySpec.model_validate(yaml.safe_load(study.to_yaml())) == study


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_methods_of_a_ready_study_differ_in_the_regularization_alone(path, monkeypatch):
    monkeypatch.chdir(path.parents[2])
    cells = expand(load_study(path))
    groups: dict[tuple[str, str], set[str]] = {}
    for cell in cells:
        plain = cell.config.model_copy(
            update={"regularization": None, "run": "", "seed": 0, "name": ""}
        )
        groups.setdefault((cell.spot.dataset, cell.spot.network), set()).add(repr(plain))
    assert all(len(found) == 1 for found in groups.values())
    assert all(
        not cell.config.regularization.architecture for cell in cells if cell.spot.method == "none"
    )


def test_a_grid_stands_for_a_method_for_each_combination(file):
    grid = "{architecture: [{name: heuristic_dropout}], grid: {p: [0.1, 0.2], k: [1, 2.5]}}"
    study = load_study(file, [f"methods.hd={grid}"])
    found = {
        name: (layer.parameters["p"], layer.parameters["k"])
        for name, method in study.methods.items()
        for layer in method.architecture
        if name.startswith("hd")
    }
    assert found == {
        "hd-p0.1-k1": (0.1, 1),
        "hd-p0.1-k2.5": (0.1, 2.5),
        "hd-p0.2-k1": (0.2, 1),
        "hd-p0.2-k2.5": (0.2, 2.5),
    }
    assert all(cell.spot.method in study.methods for cell in expand(study))
