"""The one error a user is meant to see, and how every command ends on it."""

from __future__ import annotations

import difflib
import errno
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class MedsegError(Exception):
    """Bad input, told in one to three lines: the file or key, what was found, what to do."""


class Interrupted(MedsegError):
    """The user or the scheduler asked the command to stop; what was done so far is kept."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return a hint that names the choice nearest to a mistyped word, or an empty string.

    >>> nearest("learning_rat", ["learning_rate", "seed"])
    " Did you mean 'learning_rate'?"
    >>> nearest("zzz", ["learning_rate"])
    ''
    """
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" Did you mean '{found[0]}'?" if found else ""


def explain_os_error(error: OSError) -> str:
    """Say in one line what the operating system refused, and what to do about it."""
    where = error.filename or "the output folder"
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        return f"{where}: no space is left on this disk. Free some, or write to another disk."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}: not permitted ({error.strerror}). Choose a folder that you may write to."
    if isinstance(error, FileNotFoundError):
        return f"{where}: does not exist. Check the path."
    return f"{where}: {error.strerror or error}"


def run_main(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Run a command's `main(arguments)` and turn what went wrong into a message and an exit code.

    Exit codes: 0 done, 2 bad input, 130 interrupted. Anything else is a defect of the
    program and keeps its traceback.
    """
    try:
        main(sys.argv[1:])
    except Interrupted as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except MedsegError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except OSError as error:
        if error.errno is None:
            raise
        print(f"error: {explain_os_error(error)}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        print("stopped by the user", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)
