"""The command that checks and prints a configuration, and the schema for editors."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import jsonschema
import pytest
import yaml

from medseg_reg.config import main
from medseg_reg.errors import MedsegError
from tests.test_config import FILES, LEAST, ROOT, content, load


def printed(*arguments: str) -> str:
    with redirect_stdout(io.StringIO()) as out:
        main(arguments)
    return out.getvalue()


def test_the_schema_is_valid_and_accepts_every_file_of_the_toolkit() -> None:
    schema = json.loads(printed("--schema"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for path in FILES:
        validator.validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    validator.validate(content(training={"precision": 16}))
    validator.validate(yaml.safe_load(load("").to_yaml()))
    for wrong in ({"sead": 1}, {"training": {"epochs": 0}}, {"network": {"norm": "none"}}):
        assert list(validator.iter_errors(content(**wrong)))


def test_the_command_prints_the_resolved_configuration(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(LEAST, encoding="utf-8")
    text = printed(str(path), "seed=5")
    assert yaml.safe_load(text)["seed"] == 5
    assert yaml.safe_load(text)["training"]["epochs"] == 30


@pytest.mark.parametrize("arguments", [[], ["--scheme"]])
def test_the_command_says_how_it_is_used(arguments: list[str]) -> None:
    with pytest.raises(MedsegError, match="usage: python -m medseg_reg.config"):
        main(arguments)


def test_the_command_ends_with_two_on_a_mistake() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "medseg_reg.config", "configs/dmeo.yaml"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: configs/dmeo.yaml: does not exist. Did you mean")
    assert "Traceback" not in result.stderr
