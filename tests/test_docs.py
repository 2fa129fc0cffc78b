"""The documentation says what is so: keys, commands, links and examples."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from medseg_reg.config import Config, RunConfig, load_config
from medseg_reg.config_classification import (
    ClassificationConfig,
    PresenceSpec,
    load_classification,
)
from medseg_reg.config_pretraining import MaskingSpec, PretrainingConfig, load_pretraining
from medseg_reg.regularizers import base
from medseg_reg.study.grid import expand
from medseg_reg.study.search.spec import SearchSpec, load_search
from medseg_reg.study.spec import StudySpec, load_study
from tests.scripts import load_script

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text("utf-8")) if kind == language]


def commands(page: Path) -> list[list[str]]:
    """Return the Python commands of a page, or of the comments of a configuration, as words."""
    text = page.read_text("utf-8")
    if page.suffix == ".yaml":
        shell = "\n".join(re.findall(r"^#   (.*)$", text, re.MULTILINE))
    else:
        inline = re.findall(r"`(python3? [^`\n]+)`", text)
        shell = "\n".join([*blocks(page, "bash"), *inline])
    lines = shell.replace("\\\n", " ").replace("&&", "\n").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [one for one in words if one and one[0] in ("python", "python3") and len(one) > 1]


def read(config: Path, overrides: list[str]) -> list[RunConfig]:
    """Return the configurations of the runs that a file describes."""
    if config.parent.name == "studies":
        return [cell.config for cell in expand(load_study(config, overrides))]
    if config.parent.name == "searches":
        return [load_config(load_search(config, overrides).config)]
    if config.parent.name == "pretraining":
        return [load_pretraining(config, overrides)]
    if config.parent.name == "classification":
        return [load_classification(config, overrides)]
    return [load_config(config, overrides)]


def options_of(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> set[str]:
    if module.__name__ == "medseg_reg.config":
        return {"--schema"}
    with pytest.raises(SystemExit):
        module.main(["--help"])
    return set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))


@pytest.fixture(scope="module")
def make_configuration() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")
        return load_script("docs/make_configuration.py")


def test_the_page_of_the_configuration_is_up_to_date(make_configuration: ModuleType) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    assert page == make_configuration.page(), "run python docs/make_configuration.py"


def test_the_page_of_the_configuration_names_every_key(make_configuration: ModuleType) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    listed = set(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE))

    # From the JSON Schema, another source than the page's.
    def leaves(schema: dict[str, Any], path: str) -> set[str]:
        if "$ref" in schema:
            schema = Config.model_json_schema()["$defs"][schema["$ref"].rsplit("/", 1)[-1]]
        found = {path} if path else set()
        for one in (*schema.get("anyOf", []), *schema.get("oneOf", [])):
            found |= leaves(one, path)
        if "properties" not in schema:
            items = schema.get("items", {})
            return found | (leaves(items, f"{path}[]") if "$ref" in items else set())
        for key, value in schema["properties"].items():
            found |= leaves(value, f"{path}.{key}" if path else key)
        return found

    every = leaves(Config.model_json_schema(), "")
    every |= {f"masking.{key}" for key in MaskingSpec.model_fields}
    every |= {f"presence.{key}" for key in PresenceSpec.model_fields}
    groups = {key for key in every if any(one.startswith(f"{key}.") for one in every)}
    assert every - groups - listed == set()


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS], ids=name)
def test_every_command_names_what_exists(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(page):
        shown = " ".join(words)
        used = [word.split("=")[0] for word in words if word.startswith("--")]
        if words[1] == "-m":
            if words[2] in ("venv", "pip"):
                continue
            spec = importlib.util.find_spec(words[2])
            assert spec, f"{shown}: there is no such module"
            run = f"{words[2]}.__main__" if spec.submodule_search_locations else words[2]
            known = options_of(importlib.import_module(run), capsys)
        else:
            script = ROOT / words[1]
            assert script.is_file(), f"{shown}: there is no such file"
            known = set(re.findall(r"--[a-z][a-z-]*", script.read_text("utf-8")))
        unknown = sorted(set(used) - known)
        assert not unknown, f"{shown}: has no option {', '.join(unknown)}"


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS], ids=name)
def test_every_configuration_of_a_command_can_be_read(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        for index, word in enumerate(words):
            if word.startswith("configs/") and word.endswith(".yaml"):
                rest = [w for w in words[index + 1 :] if not w.startswith((">", "-"))]
                read(ROOT / word, [w for w in rest if "=" in w])


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_every_configuration_is_valid(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert all(run.data.store.parts[0] == "data" for run in read(config, []))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_relative_link_is_broken(page: Path) -> None:
    for link in LINK.findall(BLOCK.sub("", page.read_text("utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: does not exist"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles]
            assert anchor in slugs, f"{link}: {target.name} has no such heading"


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name)
def test_the_python_examples_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))  # an example may register
    for number, text in enumerate(blocks(page, "python")):
        exec(compile(text, f"{page.name}, block {number}", "exec"), {})  # noqa: S102


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "yaml")], ids=name)
def test_the_examples_of_configurations_are_valid(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One names what a search writes.
    method = tmp_path / "runs" / "searches" / "demo" / "method.yaml"
    method.parent.mkdir(parents=True)
    method.write_text("architecture: [{name: dropout}]\n")
    monkeypatch.chdir(tmp_path)
    least = {"name": "x", "data": {"store": "s", "split": {"kind": "counts", "train": 1, "val": 1}}}
    for text in blocks(page, "yaml"):
        content = yaml.safe_load(text)
        if "methods" in content:
            StudySpec.model_validate(content)
            continue
        if "parameters" in content:
            SearchSpec.model_validate({"name": "x", "config": "x.yaml", **content})
            continue
        if "masking" in content:
            PretrainingConfig.model_validate({**least, **content})
            continue
        if "presence" in content:
            ClassificationConfig.model_validate({**least, **content})
            continue
        assert set(content) <= {"regularization", "network"}
        Config.model_validate({**least, **content})


def test_the_readme_opens_with_the_demo_and_with_the_tests() -> None:
    demo, tests = blocks(ROOT / "README.md", "bash")[:2]
    for command, end in (
        (demo, "python -m medseg_reg.train --config configs/demo.yaml"),
        (tests, "pytest"),
    ):
        steps = command.strip().split(" && ")
        assert steps[:2] == ["python3 -m venv .venv", ". .venv/bin/activate"]
        assert steps[2].startswith("pip install -c constraints.txt -e ")
        assert steps[3:] == [end]
