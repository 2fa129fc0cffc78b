"""Installed packages bring regularizers by an entry point."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from medseg_reg.regularizers import base, build, catalogue, plugins, regularizer_names

LAYER = '''\
from medseg_reg.regularizers import Regularizer, SpatialDropout, register


{decorator}class {name}(SpatialDropout):
    """A layer of another package."""
'''

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a package of one module: its code, its entry points by name, its version."""
    monkeypatch.setattr(plugins, "_state", "new")
    monkeypatch.setattr(plugins, "_origins", {})
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def one(package: str, code: str, version: str = "1.2", **entry_points: str) -> Path:
        (tmp_path / f"{package}.py").write_text(code)
        info = tmp_path / f"{package}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        )
        lines = "".join(f"{name} = {value}\n" for name, value in entry_points.items())
        (info / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{lines}")
        return tmp_path

    yield one  # type: ignore[misc]
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(
            sys.modules[name].__file__
        ):
            del sys.modules[name]


def layer(name: str, registered: str = "") -> str:
    decorator = f'@register("{registered}")\n' if registered else ""
    return LAYER.format(name=name, decorator=decorator)


def test_an_installed_class_is_a_layer_like_any_other(install: Install) -> None:
    install("plug_plain", layer("Foreign"), foreign_dropout="plug_plain:Foreign")
    assert "foreign_dropout" in regularizer_names()
    assert repr(build("foreign_dropout", p=0.2)) == "Foreign(p=0.2)"
    assert catalogue.entry("foreign_dropout").plugin == "plug_plain 1.2"
    assert "from the plugin plug_plain 1.2" in catalogue.as_table(catalogue.entries())
    assert "plugin  plug_plain 1.2" in catalogue.describe("foreign_dropout")
    assert catalogue.entry("dropout").plugin == ""


def test_a_module_may_register_several_classes_by_itself(install: Install) -> None:
    code = layer("One", "plug_one") + "\n\n" + layer("Two", "plug_two")
    install("plug_module", code, anything="plug_module")
    assert {"plug_one", "plug_two"} <= set(regularizer_names())
    assert "anything" not in regularizer_names()


def test_a_decorated_class_keeps_the_name_of_its_decorator(install: Install) -> None:
    install("plug_own", layer("Own", "own_name"), other="plug_own:Own")
    assert "own_name" in regularizer_names()
    assert "other" not in regularizer_names()


def test_a_plugin_is_imported_once(install: Install) -> None:
    install("plug_once", layer("Once"), once="plug_once:Once")
    first = base.regularizer_class("once")
    del sys.modules["plug_once"]
    assert base.regularizer_class("once") is first
    assert "plug_once" not in sys.modules


def test_a_plugin_may_ask_for_names_while_it_is_imported(install: Install) -> None:
    code = "from medseg_reg.regularizers import build\nbuild('dropout')\n" + layer("Curious")
    install("plug_curious", code, curious="plug_curious:Curious")
    assert "curious" in regularizer_names()


@pytest.mark.parametrize(
    ("code", "value", "message"),
    [
        ("import no_such_module", "plug_bad", "raised ModuleNotFoundError: No module named 'no_"),
        ("raise RuntimeError('broken')", "plug_bad", "raised RuntimeError: broken"),
        ("", "plug_bad:Missing", "raised AttributeError: .*Missing"),
        ("Missing = 3", "plug_bad:Missing", "raised ValueError: 'bad': 3 is not a subclass"),
        ("", "plug_bad", "registered no class; decorate one with @register"),
        (
            layer("Dropout", "dropout"),
            "plug_bad",
            "'dropout' is already registered for Dropout of medseg_reg.regularizers.dropout; "
            "choose another name for Dropout of plug_bad",
        ),
    ],
)
def test_a_plugin_that_cannot_be_used_is_a_warning(
    code: str, value: str, message: str, install: Install
) -> None:
    before = set(base._REGISTRY)
    install("plug_bad", code, bad=value)
    with pytest.warns(plugins.PluginWarning, match=message) as caught:
        names = regularizer_names()
    assert set(names) == before
    assert f"plugin plug_bad 1.2 of medseg_reg is not used: its entry point 'bad = {value}'" in str(
        caught[0].message
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert regularizer_names() == names  # said once


def test_what_a_broken_module_registered_is_taken_back(install: Install) -> None:
    install("plug_half", layer("Half", "half") + "\nraise RuntimeError('late')", half="plug_half")
    with pytest.warns(plugins.PluginWarning, match="late"):
        assert "half" not in regularizer_names()


def test_a_broken_plugin_does_not_keep_the_others_out(install: Install) -> None:
    install("a_broken", "1 / 0", broken="a_broken")
    install("b_good", layer("Good"), good="b_good:Good")
    install("c_same", layer("Same"), good="c_same:Same")
    with pytest.warns(plugins.PluginWarning) as caught:
        assert "good" in regularizer_names()
    told = sorted(str(one.message) for one in caught)
    assert len(told) == 2
    assert "a_broken 1.2" in told[0]
    assert "ZeroDivisionError" in told[0]
    assert "'good' is already registered for Good of b_good; choose another" in told[1]
    assert "c_same 1.2" in told[1]


def test_a_warning_that_is_an_error_leaves_the_good_ones_loaded(install: Install) -> None:
    install("a_broken", "1 / 0", broken="a_broken")
    install("b_good", layer("Good"), good="b_good:Good")
    with pytest.raises(plugins.PluginWarning, match="a_broken"):
        regularizer_names()
    assert "good" in regularizer_names()


def test_plugins_can_be_switched_off(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("plug_off", layer("Off"), off="plug_off:Off")
    monkeypatch.setenv(plugins.SWITCH, "0")
    assert "off" not in regularizer_names()
    assert "plug_off" not in sys.modules


def test_importing_loads_no_plugin_and_asking_for_names_does(install: Install) -> None:
    folder = install("plug_lazy", layer("Lazy"), lazy="plug_lazy:Lazy")
    code = (
        "import sys, medseg_reg.regularizers as r\n"
        "print('plug_lazy' in sys.modules, 'lazy' in r.regularizer_names(), r.build('lazy', p=0.3))"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(root)])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split() == ["False", "True", "Lazy(p=0.3)"]
