"""`python -m medseg_reg.regularizers` tells what is there."""

import inspect
import json
import subprocess
import sys
from typing import Any

import pytest

from medseg_reg.errors import MedsegError
from medseg_reg.regularizers import (
    Regularizer,
    base,
    build,
    catalogue,
    register,
    regularizer_class,
    regularizer_names,
)
from medseg_reg.regularizers.__main__ import main


class Infinite(Regularizer):
    """Drops nothing that counts."""

    unit, paper, needs, spatial_dims = "nothing", "Nobody 2000", "time", (1, 3)

    def __init__(self, p: float = 0.25, heat: float = float("inf"), sides: Any = (1, 2)) -> None:
        super().__init__(p)
        self.heat, self.sides = heat, sides


@pytest.fixture
def infinite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    register("infinite")(Infinite)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(arguments)
    return capsys.readouterr().out


def test_the_list_holds_every_method_with_what_the_class_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = printed(capsys).splitlines()
    rows = {line.split()[0]: line for line in lines[1:] if not line.startswith(" ")}
    assert tuple(rows) == regularizer_names()
    text = " ".join(" ".join(lines).split())
    for name, row in rows.items():
        cls = regularizer_class(name)
        assert (" yes " in row) == cls.stochastic
        assert f"  {', '.join(cls.default_places)}  " in row
        assert f" {cls.unit} {cls.__name__}: " in text
        assert f"{cls.__name__}: {cls.paper}" in text
        assert f"needs {cls.needs}" in text or not cls.needs


@pytest.mark.parametrize(("columns", "limit"), [("60", 80), ("80", 80), ("300", 100)])
def test_the_list_fits_the_terminal(
    columns: str, limit: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert max(map(len, printed(capsys).splitlines())) <= limit


@pytest.mark.usefixtures("infinite")
def test_axes_needs_and_class_of_a_new_method_are_listed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row, class_line, needs = printed(capsys).partition("\ninfinite ")[2].splitlines()[:3]
    assert row.split() == ["1,", "3", "yes", "between_convs", "nothing"]
    assert class_line.strip() == "Infinite: Nobody 2000"
    assert needs.strip() == "needs time"


@pytest.mark.parametrize("name", regularizer_names())
def test_one_method_is_shown_with_its_arguments_and_its_docstring(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, name)
    cls = regularizer_class(name)
    assert text.startswith(f"{cls.__name__}(\n    p: float = ")
    for parameter in inspect.signature(cls).parameters.values():
        assert f"    {parameter.name}: {parameter.annotation} = {parameter.default!r},\n" in text
    assert inspect.getdoc(cls) in text
    exec(text.partition("\nimport ")[2].partition("\n")[0].strip(), {})  # noqa: S102


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    listed = json.loads(printed(capsys, "--json"))
    assert [one["name"] for one in listed] == list(regularizer_names())
    for one in listed:
        cls = regularizer_class(one["name"])
        assert (one["class_name"], one["unit"]) == (cls.__name__, cls.unit)
        assert (one["paper"], one["needs"]) == (cls.paper, cls.needs)
        assert one["stochastic"] is cls.stochastic
        assert tuple(one["spatial_dims"]) == cls.spatial_dims
        assert tuple(one["default_places"]) == cls.default_places
        assert one["plugin"] == ""
    (alone,) = json.loads(printed(capsys, "corrdrop_spatial", "--json"))
    assert {p["name"]: p["default"] for p in alone["parameters"]} == {
        "p": 0.1, "block_size": 5, "temperature": 1.0, "faithful": False,
    }  # fmt: skip


@pytest.mark.usefixtures("infinite")
def test_json_has_no_number_that_json_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(value: str) -> None:
        raise AssertionError(value)

    (one,) = json.loads(printed(capsys, "infinite", "--json"), parse_constant=refuse)
    assert [p["default"] for p in one["parameters"]] == [0.25, "inf", [1, 2]]


def test_the_defaults_that_are_listed_are_those_of_the_layer() -> None:
    for one in catalogue.entries():
        layer = build(one.name)
        for parameter in one.parameters:
            assert getattr(layer, parameter.name) == parameter.default, one.name


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(MedsegError, match=r"did you mean 'heuristic_dropout'\?.*choices: "):
        main(["heuristc_dropout"])


def test_the_command_ends_with_code_2_on_a_wrong_name_and_stays_light() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv[1:] = ['dropuot']\n"
        "try:\n"
        "    runpy.run_module('medseg_reg.regularizers', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print(end.code, *sorted(m for m in sys.modules if m in ('monai', 'pydantic')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2"]
    assert "error: unknown regularizer 'dropuot'; did you mean 'dropout'?" in done.stderr


def test_a_reader_that_stops_early_is_no_error() -> None:
    command = [sys.executable, "-m", "medseg_reg.regularizers", "dropout"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.close()
        assert running.stderr is not None
        assert running.stderr.read() == b""
    assert running.returncode == 0
