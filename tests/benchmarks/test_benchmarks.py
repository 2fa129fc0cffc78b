"""The benchmarks run from end to end on a small machine, and their tables say what they mean."""

from __future__ import annotations

import argparse
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import __main__ as everything
from benchmarks import conversion, growth, kernels, layers, steps, tokens, training
from benchmarks.loading import loops, measure_loading, quartiles
from benchmarks.ratios import Row, markdown, rows_of
from data_prep.phantom import make_demo
from medseg_reg.data.store import SliceStore
from medseg_reg.errors import MedsegError

ORDERS = ("contiguous", "channels_last")


def test_a_ratio_is_that_of_medians_and_the_spread_is_its_own():
    rows = rows_of("step", {"without": [1.0, 2.0, 9.0], "with": [4.0, 5.0, 3.0]}, "without")
    assert rows == [
        Row("step", "without", "without", 1.0, 2.0, 4.0),
        Row("step", "with", "without", 2.0, 4.0, 0.5),
    ]
    assert markdown(rows).splitlines()[-1] == "| step | with | without | 2 | 4e+03 | 50% |"


def test_every_item_costs_more_than_a_copy_of_its_bytes():
    times = quartiles(measure_loading(size=64, slices=16, repeats=12, device="cpu"))
    assert min(times["item, elastic"]) > max(times["floor"])


@pytest.mark.parametrize("kind", conversion.KINDS)
def test_a_plain_loop_reads_what_the_floor_reads(tmp_path, kind):
    task = conversion.KINDS[kind](tmp_path, 32, 8)
    for plain, least in zip(task.loop(task.source), task.floor(task.source), strict=True):
        assert plain.shape == least.shape
        # SimpleITK orders slices by position and rescales to HU; the values are the same else.
        order = (plain - plain.mean(), least - least.mean())
        assert np.allclose(*(np.sort(one, axis=None) for one in order), atol=1e-3)


@pytest.mark.parametrize("kind", conversion.KINDS)
def test_a_conversion_is_measured_beside_its_floor_and_a_plain_loop(kind):
    times = conversion.measure(kind, 32, 16, rounds=2)
    assert list(times) == ["floor", "converter", "plain loop"]
    assert all(len(pairs) == 2 for pairs in times.values())


def test_scripts_read_the_slice_that_the_store_has(tmp_path):
    make_demo(tmp_path / "store", cases=3, size=64, slices=16)
    store = SliceStore(tmp_path / "store")
    volume = store.image(store.manifest.cases[0].name)
    read = loops(store, tmp_path)
    for name in ("nibabel, .nii", "nibabel, .nii.gz"):  # columns come first in the file
        assert np.array_equal(read[name](5).T, volume[5])
    assert np.array_equal(read["SimpleITK, .nii.gz"](5), volume[5])
    shown = 255 * read["PIL, .png"](5)
    assert np.abs(shown - np.clip((volume[5] + 100.0) * 255 / 340, 0, 255)).max() < 1


def test_a_step_is_measured_with_each_method_beside_one_without(monkeypatch):
    monkeypatch.setattr(steps, "keep_freed_memory", lambda: None)
    words = ["--size", "32", "--batch", "2", "--width", "4", "--levels", "3", "--rounds", "2"]
    names = ("spatial_dropout", "cutout")
    found = steps.measure_steps(steps.parser().parse_args(words), names)
    # Five pairs of convolutions, and the one input.
    titles = ["without", "spatial_dropout at 5 places", "cutout at 1 place"]
    assert [row.name for row in found] == titles
    assert all(row.against == "without" and row.ratio > 0 for row in found)


def test_a_step_is_measured_in_each_format(monkeypatch):
    monkeypatch.setattr(steps, "keep_freed_memory", lambda: None)
    words = ["--size", "32", "--batch", "2", "--width", "4", "--levels", "3", "--rounds", "2"]
    found = steps.measure_formats(steps.parser().parse_args([*words, "--norm", "instance"]))
    orders = [f"{number}, {order}" for number in ("32", "bf16") for order in ORDERS]
    assert [row.name for row in found] == orders
    assert all(row.part == "step, batch 2 of 32, instance norm" for row in found)


def test_a_compiled_step_is_measured_with_its_first_call(monkeypatch):
    monkeypatch.setattr(steps, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(steps, "compiled_pass", lambda network: network)
    words = ["--size", "32", "--batch", "2", "--width", "4", "--levels", "3", "--rounds", "2"]
    found = steps.measure_compiling(steps.parser().parse_args([*words, "spatial_dropout"]))
    assert [row.name for row in found] == ["plain", "compiled", "compiled, the first"]


def test_the_layers_stand_beside_dropout_a_convolution_and_a_copy(monkeypatch):
    monkeypatch.setattr(layers, "regularizer_names", lambda: ("spatial_dropout",))
    monkeypatch.setattr(layers, "shape", lambda text: (1, 4, 16, 16))
    found = layers.rows(argparse.Namespace(full=False, device="cpu"))
    assert {row.name for row in found} == {*layers.BESIDE, "spatial_dropout"}
    assert {row.against for row in found} == {*layers.BESIDE[:2], "map"}


def test_networks_on_fewer_tokens_stand_beside_one_on_all(monkeypatch):
    pytest.importorskip("einops")
    monkeypatch.setattr(tokens, "BLOCKS", 4)
    words = ["--sides", "4", "--width", "12", "--batch", "1", "--rounds", "1"]
    found = tokens.rows(tokens.parser().parse_args(words))
    names = ["plain", *tokens.LAYERS, *tokens.SELECTIONS]
    assert [row.name for row in found] == names * 2
    parts = {"training step, 16 patches", "evaluation, 16 patches"}
    assert {row.part for row in found} == parts
    assert all(row.against == "plain" and row.ratio > 0 for row in found)


def test_growth_is_told_for_maps_cases_and_workers(monkeypatch, capsys):
    monkeypatch.setattr(growth, "START", (1, 4, 8, 8))
    monkeypatch.setattr(growth, "LARGER", {"batch x 2": (2, 4, 8, 8)})
    options = growth.parser().parse_args(["spatial_dropout", "--rounds", "1", "--slices", "16"])
    found = growth.layer_growth(options, options.names)
    assert {row.name for row in found} == {"map", "batch x 2"}
    assert {row.part for row in found} >= {"growth of spatial_dropout"}
    monkeypatch.setattr(growth, "loaded", lambda store, workers, slices: 1.0 / (1 + workers))
    ratios = {row.name: row.ratio for row in growth.loading_growth(options)}
    assert ratios["cases: 32"] == 1
    assert ratios["workers: 1"] == 0.5
    assert "store" not in capsys.readouterr().out


@pytest.mark.slow
def test_training_is_measured_with_one_process_and_with_two():
    options = growth.parser().parse_args(["--rounds", "1", "--steps", "2"])
    found = growth.rank_growth(options)
    assert [row.name for row in found] == ["processes: 1", "processes: 2"]
    assert all(row.ratio > 0 for row in found)


def test_an_epoch_of_a_store_is_loaded(tmp_path):
    make_demo(tmp_path / "store", cases=8, size=64, slices=16)
    assert growth.loaded(tmp_path / "store", 0, 24) > 0


def test_both_sides_of_a_pair_train_the_same_network(tmp_path):
    from monai.networks.nets import BasicUNet
    from segmentation_models_pytorch import Unet

    from medseg_reg.engine.network import build_run_network
    from medseg_reg.networks.build import parameter_count
    from medseg_reg.summary import assumed_facts

    plain = {
        "monai": BasicUNet(2, 1, 2, features=training.network_of("monai", 4)["features"]),
        "smp": Unet("resnet18", encoder_weights=None, in_channels=1, classes=2),
    }
    for pair, theirs in plain.items():
        options = training.parser().parse_args(["--width", "4", "--pair", pair])
        config = training.configuration(options, tmp_path, tmp_path, plain=False)
        ours, _ = build_run_network(config, assumed_facts(1, 2))
        assert parameter_count(ours) == parameter_count(theirs)


@pytest.fixture
def parts(monkeypatch):
    """Replace what the parts measure."""
    made = {"imports": lambda options: [Row("start", "a", "b", 0.5, 0.02, 0.1)]}
    monkeypatch.setattr(everything, "part", made.__getitem__)
    return made


@pytest.mark.usefixtures("parts")
def test_the_command_writes_a_table_with_machine_and_versions(tmp_path, capsys):
    out = tmp_path / "folder" / "table.md"
    everything.main(["--parts", "imports", "--out", str(out)])
    text = out.read_text()
    assert text in capsys.readouterr().out
    assert f"torch {metadata.version('torch')}" in text
    assert "| start | a | b | 0.5 | 20 | 10% |" in text


@pytest.mark.usefixtures("parts")
def test_each_run_of_the_command_has_a_table_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    everything.main(["--parts", "imports"])
    assert len(list((tmp_path / "runs" / "benchmarks").glob("*.md"))) == 1


def test_a_part_that_fails_leaves_the_others(tmp_path, parts):
    def fails(options):
        raise RuntimeError("out of\nmemory")

    parts["steps"] = fails
    out = tmp_path / "table.md"
    with pytest.raises(MedsegError, match="not measured: steps"):
        everything.main(["--parts", "steps", "imports", "--out", str(out)])
    assert "* steps: not measured (out of memory)" in out.read_text()
    assert "| start | a | b |" in out.read_text()


def test_what_cannot_be_done_is_told_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(everything, "part", lambda name: pytest.fail("measured"))
    for words, message in (
        (["--device", "cuda", "--out", str(tmp_path / "t.md")], "no GPU"),
        (["--out", str(tmp_path)], "is a folder"),
    ):
        with pytest.raises(MedsegError, match=message):
            everything.main(words)


def test_without_a_gpu_the_kernels_are_noted_and_nothing_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out = tmp_path / "table.md"
    everything.main(["--parts", "kernels", "--out", str(out)])
    assert "Triton kernels: not measured (they run on a GPU)" in out.read_text()
    with pytest.raises(MedsegError, match="torch sees none here"):
        kernels.main([])


def test_kernels_that_are_not_used_or_select_otherwise_are_not_measured(monkeypatch):
    x = torch.rand(1, 8, 6, 6)
    with pytest.raises(RuntimeError, match=r"sum_levels is not used for torch\.float32 on cpu"):
        kernels.require_agreement(x)
    monkeypatch.setattr(kernels.operators, "fits", lambda x, levels=0: True)
    monkeypatch.setattr(kernels.operators, "_sound", lambda name, device: True)
    others = SimpleNamespace(
        sum_levels=lambda x, t: -kernels.histogram.plain_sums(x, t),
        filter_planes=kernels.planes.plain_filter,
    )
    monkeypatch.setattr(kernels.operators, "_kernels", lambda: others)
    with pytest.raises(RuntimeError, match="select other channels"):
        kernels.require_agreement(x)
    others.sum_levels = kernels.histogram.plain_sums
    kernels.require_agreement(x)


@pytest.mark.parametrize("name", everything.PARTS)
def test_every_part_can_be_measured(name):
    assert callable(everything.part(name))
