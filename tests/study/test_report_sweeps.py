"""A sweep is drawn over the numbers that were run, which stay apart and can be read."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pandas as pd
import pytest
import yaml
from matplotlib import pyplot

from medseg_reg.study.grid import expand
from medseg_reg.study.report.drawing import RC, fewer_ticks, mark_numbers
from medseg_reg.study.report.figures import sweep
from medseg_reg.study.report.sweeps import Sweep, find_sweeps
from medseg_reg.study.spec import load_study
from tests.study.studies import study_of

OF_THE_PAPER = [0.1, 0.2, 0.5, 1, 2, 3, 5, 10]


def sweep_of(numbers):
    return Sweep("architecture.0.k", "k", {f"k_{number:g}": number for number in numbers})


def marked(numbers, width=4.4):
    """Return the axes of a sweep, and the boxes of the labels that are shown, by their texts."""
    with matplotlib.rc_context(RC):
        figure, axes = pyplot.subplots(figsize=(width, 3), layout="constrained")
        axes.plot(numbers, range(len(numbers)))
        mark_numbers(axes, numbers, sweep_of(numbers).logarithmic)
        figure.canvas.draw()
    pyplot.close(figure)
    labels = [label for label in axes.get_xticklabels() if label.get_text()]
    return axes, {label.get_text(): label.get_window_extent() for label in labels}


@pytest.mark.parametrize(
    ("numbers", "scale"),
    [
        (OF_THE_PAPER, "log"),
        ([0.015, 0.1, 0.3], "log"),
        ([1, 2, 19], "linear"),
        ([0, 1, 100], "linear"),
        ([-1, 1, 100], "linear"),
    ],
)
def test_the_axis_is_logarithmic_where_positive_numbers_span_a_factor_of_20(numbers, scale):
    axes, _ = marked(numbers)
    assert axes.get_xscale() == scale
    assert axes.get_xticks().tolist() == numbers
    assert axes.get_xticks(minor=True).tolist() == []


@pytest.mark.parametrize(
    "numbers",
    [
        OF_THE_PAPER,
        [0.1, 0.11, 0.2, 0.5, 0.6, 0.7, 1, 1.9],
        [1, 1.01, 1.02, 99, 99.5, 100],
        [0.00012345, 0.00012346, 0.5],
    ],
)
@pytest.mark.parametrize("width", [4.4, 2.0])
def test_labels_do_not_overlap_and_the_ends_keep_theirs(numbers, width):
    _, boxes = marked(numbers, width)
    assert {f"{numbers[0]:g}", f"{numbers[-1]:g}"} <= boxes.keys()
    order = list(boxes.values())
    assert all(left.x1 < right.x0 for left, right in pairwise(order))


@pytest.mark.parametrize("ends", [(-0.071, 0.027), (-140, 60), (0.9995, 0.9996)])
def test_ticks_are_taken_away_until_their_labels_stand_apart(ends):
    with matplotlib.rc_context(RC):
        figure, axes = pyplot.subplots(figsize=(1.6, 1), layout="constrained")
        axes.plot(ends, (0, 0))
        fewer_ticks(axes)
        figure.canvas.draw()
    pyplot.close(figure)
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    low, high = axes.get_xlim()
    assert any(low <= tick <= high for tick in axes.get_xticks())


def test_all_numbers_of_the_paper_have_a_label():
    _, boxes = marked(OF_THE_PAPER)
    assert list(boxes) == ["0.1", "0.2", "0.5", "1", "2", "3", "5", "10"]


def test_the_caption_says_so():
    def drawn(numbers):
        one = sweep_of(numbers)
        rows = [{"method": name, "mean": 0.7, "low": 0.6, "high": 0.8} for name in one.values]
        with matplotlib.rc_context(RC):
            return sweep(SimpleNamespace(baseline="none"), ("a", "b"), pd.DataFrame(rows), one)

    assert "DICE over k (logarithmic axis), with" in drawn([0.1, 1, 10]).caption
    assert "DICE over k, with" in drawn([1, 2, 3]).caption


@pytest.mark.parametrize(
    ("layers", "key"),
    [
        ([{"k": 1}, {}, {"k": 4}], "architecture.0.k"),
        ([{"p": 0.2, "k": 2}, {}, {"p": 0.3}], "architecture.0.p"),
    ],
)
def test_a_method_with_a_default_is_part_of_the_sweep(tmp_path, layers, key):
    methods = {f"m{n}": [{"name": "heuristic_dropout", **one}] for n, one in enumerate(layers)}
    study = study_of(tmp_path / "store", tmp_path, methods={"none": [], **methods}, seeds=1)
    cells = expand(study)
    runs = pd.DataFrame([{**cell.spot._asdict(), "run": cell.path} for cell in cells])
    configs = {cell.path: yaml.safe_load(cell.config.to_yaml()) for cell in cells}
    source = SimpleNamespace(runs=runs, file=lambda run, name: configs[run])
    (found,) = find_sweeps(source, ("blobs", "unet"))
    assert found.key == key
    assert set(found.values) == {"m0", "m1", "m2"}
    (layer,) = yaml.safe_load(study.to_yaml())["methods"]["m1"]["architecture"]
    assert found.values["m1"] == layer[key[-1]]


@pytest.mark.parametrize(
    ("name", "seeds"), [("heuristic_dropout_k", 3), ("heuristic_dropout_k_icassp2022", 5)]
)
def test_the_ready_studies_go_over_the_numbers_of_the_paper(monkeypatch, name, seeds):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    cells = expand(load_study(root / f"configs/studies/{name}.yaml"))
    layers = {cell.spot.method: cell.config.regularization.architecture for cell in cells}
    assert layers.pop("none") == ()
    assert [one.parameters["k"] for (one,) in layers.values()] == OF_THE_PAPER
    assert {(one.name, one.places, one.parameters["p"]) for (one,) in layers.values()} == {
        ("heuristic_dropout", ("between_convs",), 0.1)
    }
    assert {cell.spot.seed for cell in cells} == set(range(seeds))
