"""Every command ends on an exit code and a message, never on a traceback the user caused."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

import pytest

from medseg_reg.errors import Interrupted, MedsegError, explain_os_error, nearest, run_main


def end_of(error: BaseException | None) -> int:
    """Return the exit code of a command that ends with an error, or well."""

    def main(_: Sequence[str]) -> None:
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (None, 0, ""),
        (MedsegError("bad key"), 2, "error: bad key\n"),
        (Interrupted("kept a checkpoint"), 130, "stopped: kept a checkpoint\n"),
        (KeyboardInterrupt(), 130, "stopped by the user\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x.npy"), 2, "error: x.npy: does not "),
        (OSError(errno.ENOSPC, "No space left", "x.npy"), 2, "error: x.npy: no space is left"),
    ],
)
def test_a_command_ends_with_a_code_and_a_message(
    error: BaseException | None, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_of(error) == code
    out, found = capsys.readouterr()
    assert found.startswith(said)
    assert bool(found) == bool(said)
    assert not out
    assert "Traceback" not in found


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x"), OSError("no number")])
def test_a_defect_of_the_program_keeps_its_traceback(error: Exception) -> None:
    def main(_: Sequence[str]) -> None:
        raise error

    with pytest.raises(type(error)) as found:
        run_main(main)
    assert found.value is error


def test_a_command_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Sequence[str]] = []
    monkeypatch.setattr("sys.argv", ["train", "--config", "x", "seed=1"])
    with pytest.raises(SystemExit):
        run_main(seen.append)
    assert seen == [["--config", "x", "seed=1"]]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "no space is left on this disk"),
        (errno.EDQUOT, "no space is left on this disk"),
        (errno.EACCES, "Choose a folder that you may write to"),
        (errno.EPERM, "Choose a folder that you may write to"),
        (errno.EROFS, "Choose a folder that you may write to"),
        (errno.ENOENT, "does not exist. Check the path"),
        (errno.EMFILE, "Too many open files"),
    ],
)
@pytest.mark.parametrize("name", ["data/x.npy", None])
def test_what_the_system_refused_is_told_in_one_line(
    number: int, said: str, name: str | None
) -> None:
    told = explain_os_error(OSError(number, os.strerror(number), name))
    assert told.startswith(f"{name or 'the output folder'}: ")
    assert said in told
    assert "\n" not in told


def test_an_interruption_is_bad_input_to_nobody_but_can_be_caught_as_one() -> None:
    assert issubclass(Interrupted, MedsegError)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("epoch", " Did you mean 'epochs'?"),
        ("sede", " Did you mean 'seed'?"),
        ("something else", ""),
        ("", ""),
    ],
)
def test_the_nearest_word_is_named_if_one_is_near(word: str, hint: str) -> None:
    assert nearest(word, ["seed", "epochs", "lr"]) == hint
    assert nearest(word, []) == ""
