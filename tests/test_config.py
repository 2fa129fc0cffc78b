"""A configuration is read exactly as written, or refused with a message that mends it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_reg.config import Config, load_config, parse_config
from medseg_reg.config_file import MAX_BYTES
from medseg_reg.config_regularization import LayerSpec
from medseg_reg.errors import MedsegError

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.yaml"))
LEAST = """\
name: x
data:
  store: some/store
  split: {kind: counts, train: 3, val: 1}
"""


def load(text: str, *overrides: str) -> Config:
    """Read the least configuration and some more lines."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(LEAST + text, encoding="utf-8")
        return load_config(path, overrides)


def refusal(text: str, *overrides: str) -> str:
    """Return the message with which a configuration is refused."""
    with pytest.raises(MedsegError) as error:
        load(text, *overrides)
    return str(error.value)


def content(**changes: Any) -> dict[str, Any]:
    return {**yaml.safe_load(LEAST), **changes}


def again(config: Config) -> Config:
    """Write a configuration and read it back, as a run directory does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(config.to_yaml(), encoding="utf-8")
        return load_config(path)


# Reading what is right


def test_what_is_not_written_has_its_default() -> None:
    config = load("")
    assert config == Config.model_validate(content())
    assert (config.seed, config.training.epochs, config.optimizer.lr) == (0, 30, 1e-3)
    assert config.regularization.architecture == ()
    assert config.run_path == Path("runs/x")


def test_a_run_names_itself_by_name_and_seed() -> None:
    assert load("seed: 4\nrun: out/{name}/s{seed}").run_path == Path("out/x/s4")
    assert load("run: 'out/{other}'").run_path == Path("out/{other}")


def test_a_configuration_never_changes() -> None:
    config = load("")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        config.training.epochs = 3  # type: ignore[misc]


def test_layers_and_transforms_keep_their_own_parameters() -> None:
    config = load(
        "regularization:\n"
        "  data: [{name: Rotate, limit: [-5, 5], p: 0.3}]\n"
        "  architecture:\n"
        "    - {name: heuristic_dropout, places: input, p: 0.2, k: 3}\n"
        "    - {name: dropout, places: [head, skip.0]}\n"
    ).regularization
    assert config.data[0].arguments == {"limit": [-5, 5], "p": 0.3}
    assert config.architecture[0].parameters.items() >= {"p": 0.2, "k": 3}.items()
    assert config.architecture[0].places == ("input",)
    assert config.architecture[1].parameters == {"p": 0.5}  # its default
    assert config.architecture[1].places == ("head", "skip.0")


@pytest.mark.parametrize(
    ("layer", "places", "p"),
    [("input_dropout", ("input",), 0.3), ("dropout", ("between_convs",), 0.5)],
)
def test_a_layer_without_places_goes_where_its_class_belongs(
    layer: str, places: tuple[str, ...], p: float
) -> None:
    config = load(f"regularization: {{architecture: [{{name: {layer}}}]}}")
    assert config.regularization.architecture[0].places == places
    assert LayerSpec(name=layer).places == places
    assert again(config) == config
    written = yaml.safe_load(config.to_yaml())["regularization"]["architecture"]
    schedule = {"name": "constant", "start": 0.0, "duration": 1.0, "turn": 0.1}
    assert written == [
        {"name": layer, "places": list(places), "schedule": schedule, "depth_ramp": None, "p": p}
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_of_the_toolkit_is_read_and_written_back(path: Path) -> None:
    config = load_config(path)
    assert again(config) == config
    assert again(config).to_yaml() == config.to_yaml()


def test_there_are_configurations_to_read() -> None:
    assert FILES


@given(
    name=st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,12}\Z"),
    run=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1),
    lr=st.floats(1e-12, 1e6),
    seed=st.integers(0, 2**32 - 1),
    p=st.floats(0, 0.99),
    places=st.lists(st.sampled_from(["head", "1e5", "*", "no", "skip.0"]), min_size=1),
)
@settings(max_examples=25, deadline=None)
def test_a_written_configuration_is_read_back_as_it_was(
    name: str, run: str, lr: float, seed: int, p: float, places: list[str]
) -> None:
    config = Config.model_validate(
        content(
            name=name,
            run=run,
            seed=seed,
            optimizer={"lr": lr},
            regularization={"architecture": [{"name": "dropout", "p": p, "places": places}]},
        )
    )
    assert again(config) == config


def test_an_infinite_parameter_of_a_layer_is_read_back() -> None:
    layer = "regularization: {architecture: [{name: corrdrop_channel, temperature: .inf}]}"
    config = load(layer)
    assert config.regularization.architecture[0].parameters["temperature"] == float("inf")
    assert again(config) == config


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1e-3", "1.e-3", ".1e-2", "0.001", "1.0e-03"])
def test_numbers_with_an_exponent_are_numbers_everywhere(text: str) -> None:
    config = load(
        f"optimizer: {{lr: {text}}}\n"
        f"regularization: {{architecture: [{{name: dropout, p: {text}}}]}}\n"
    )
    assert config.optimizer.lr == 1e-3
    assert config.regularization.architecture[0].parameters == {"p": 1e-3}


def test_texts_that_look_like_numbers_stay_texts_in_quotes() -> None:
    assert load("run: '1e5'").run == "1e5"


# Refusing what is wrong


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "training:\n  epoch: 3",
            "run.yaml:6: unknown key 'training.epoch'. Did you mean 'epochs'",
        ),
        ("\noptimiser: {lr: 1}", "run.yaml:6: unknown key 'optimiser'. Did you mean 'optimizer'"),
        ("schedule: {nam: step}", "Known here: name, warmup_epochs"),
        (
            "regularization:\n  optimization:\n    early_stopping:\n      patiense: 3",
            "run.yaml:8: unknown key 'regularization.optimization.early_stopping.patiense'. "
            "Did you mean 'patience'",
        ),
        ("seed: 1\nseed: 2", "run.yaml:6: 'seed' is given a second time (first in line 5)"),
        ("training: {epochs: 3, epochs: 3}", "'training.epochs' is given a second time"),
        ("1: 2", "'1': keys should be strings"),
        ("? [a, b]\n: 2", "run.yaml:5: a key must be plain text"),
    ],
)
def test_a_wrong_key_is_named_with_its_line_and_the_nearest_right_one(
    text: str, message: str
) -> None:
    assert message in refusal(text)


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ("seed: one", "seed", "valid integer"),
        ("seed: -1", "seed", "greater than or equal to 0"),
        ("seed: 1.5", "seed", "valid integer"),
        ("seed: yes", "seed", "a switch is no number"),
        ("training: {epochs: true}", "training.epochs", "a switch is no number"),
        ("training: {epochs: 0}", "training.epochs", "greater than or equal to 1"),
        ("training: {progress: perhaps}", "training.progress", "valid boolean"),
        ("training: {precision: bf61}", "training.precision", "Did you mean 'bf16'"),
        ("training: {precision: 64}", "training.precision", "(found '64')"),
        ("training: {validate_every: 31}", "the configuration", "no epoch would be validated"),
        ("optimizer: {lr: .inf}", "optimizer.lr", "finite"),
        ("optimizer: {lr: .nan}", "optimizer.lr", "(found nan)"),
        ("optimizer: {lr: 0}", "optimizer.lr", "greater than 0"),
        ("optimizer: {betas: [0.9]}", "optimizer.betas.1", "missing"),
        ("optimizer: [adam]", "optimizer", "valid dictionary"),
        ("network: {channels: [8]}", "network.channels", "at least 2"),
        ("network: {channels: [8, 0]}", "network.channels.1", "greater than or equal to 1"),
        ("network: {channels: 8}", "network.channels", "valid tuple"),
        ("network: {norm: bacth}", "network.norm", "Did you mean 'batch'"),
        ("schedule: {name: step}", "schedule", "milestones"),
        ("schedule: {milestones: [3]}", "schedule", "milestones"),
        ("regularization: {error: {ce: 0}}", "regularization.error", "at least one"),
        (
            "regularization: {error: {label_smoothing: 1}}",
            "regularization.error.label_smoothing",
            "1",
        ),
        ("regularization: {architecture: [dropout]}", "regularization.architecture.0", "'dropout'"),
        (
            "regularization: {architecture: [{p: 0.1}]}",
            "regularization.architecture.0.name",
            "missing",
        ),
        ("run: null", "run", "valid string"),
    ],
)
def test_a_wrong_value_is_named_with_key_and_line(text: str, key: str, message: str) -> None:
    said = refusal(text)
    assert f"'{key}'" in said or key in said.split(": ", 1)[1]
    assert message in said
    assert "run.yaml" in said
    assert "pydantic" not in said


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("{name: hueristic_dropout}", "did you mean 'heuristic_dropout'"),
        ("{name: dropout, q: 0.1}", "unknown parameter of dropout 'q'"),
        ("{name: heuristic_dropout, binz: 4}", "did you mean 'bins'"),
        ("{name: dropout, p: 1}", "Dropout: p is the share of units to drop"),
        ("{name: dropout, p: often}", "got 'often'"),
        ("{name: heuristic_dropout, bins: 0}", "bins must be a whole number"),
        ("{name: dropout, places: []}", "architecture.0.places': tuple should have at least 1"),
        ("{name: dropout, places: 3}", "architecture.0.places"),
    ],
)
def test_a_layer_that_cannot_be_built_is_refused_at_once(layer: str, message: str) -> None:
    said = refusal(f"regularization:\n  architecture:\n    - {layer}")
    assert "run.yaml:7: 'regularization.architecture.0" in said
    assert message in said


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("{name: Rotat}", "unknown augmentation 'Rotat'. Did you mean 'Rotate'"),
        ("{name: Rotate, limt: 3}", "Rotate has no argument 'limt'. Did you mean 'limit'"),
        ("{name: Rotate, p: 7}", "Rotate: "),
        ("{name: Affine, mask_interpolation: 1}", "Affine with mask_interpolation 1: labels"),
    ],
)
def test_a_transform_that_cannot_be_built_is_refused_at_once(step: str, message: str) -> None:
    said = refusal(f"regularization:\n  data:\n    - {step}")
    assert f"run.yaml:7: 'regularization.data.0': {message}" in said


def test_three_mistakes_are_shown_and_the_others_counted() -> None:
    said = refusal("a: 1\nb: 1\nc: 1\nd: 1\nseed: x").splitlines()
    assert len(said) == 3
    assert said[-1].endswith("(and 2 more)")


def test_a_missing_key_is_named() -> None:
    with pytest.raises(MedsegError, match="x: 'data' is missing. Add it"):
        parse_config({"name": "x"}, "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: &a 1\nrun: *a", r"run.yaml:6: is not valid YAML: aliases \(\*name\)"),
        ("seed: !!python/object/apply:os.getpid []", "run.yaml:5: is not valid YAML: could not"),
        ("seed: !!python/name:os.system", "is not valid YAML"),
        ("seed: !mine 3", "is not valid YAML"),
        ("training:\n\tepochs: 3", "run.yaml:6: is not valid YAML"),
        ("seed: [1", "is not valid YAML"),
        ("---\nseed: 1", "is not valid YAML.*another document"),
        ("run: \x07", "is not valid YAML"),
        ("run: 2020-13-45", "is not valid YAML: month must be in 1..12"),
        ("seed: " + "9" * 5000, "is not valid YAML: .*digits"),
        ("run: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("# " + "x" * MAX_BYTES, "larger than 1 MiB"),
    ],
)
def test_what_is_no_plain_yaml_is_refused(text: str, message: str) -> None:
    with pytest.raises(MedsegError, match=message):
        load(text)


def test_a_tag_never_runs_code(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    refusal(f"run: !!python/object/apply:os.mkdir ['{trace}']")
    refusal("", f"run=!!python/object/apply:os.mkdir ['{trace}']")
    assert not trace.exists()


@pytest.mark.parametrize("text", ["", "3", "[1, 2]", "words"])
def test_a_file_that_holds_no_settings_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(MedsegError, match="holds no configuration"):
        load_config(tmp_path / "c.yaml")


def test_a_missing_file_suggests_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "pancreas.yaml").touch()
    with pytest.raises(MedsegError, match="does not exist. Did you mean '.*/pancreas.yaml'"):
        load_config(tmp_path / "pancraes.yaml")
    with pytest.raises(MedsegError, match=r"none/x.yaml: does not exist\.$"):
        load_config(tmp_path / "none" / "x.yaml")


def test_a_folder_or_a_picture_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\x89PNG\xff\xfe")
    for path in (tmp_path, tmp_path / "c.yaml"):
        with pytest.raises(MedsegError, match="is not a YAML text file"):
            load_config(path)


@given(st.binary(max_size=60))
@settings(max_examples=150, deadline=None)
def test_no_file_whatever_crashes_the_reader(noise: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_bytes(noise)
        with pytest.raises(MedsegError):
            load_config(path)
