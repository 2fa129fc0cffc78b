"""List the regularizers, or describe one.

python -m medseg_reg.regularizers                      # all of them
python -m medseg_reg.regularizers heuristic_dropout    # arguments, rule and paper of one
python -m medseg_reg.regularizers --json               # the list, for programs
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence

from medseg_reg.errors import MedsegError, run_main
from medseg_reg.regularizers import catalogue

_MIN_WIDTH, _MAX_WIDTH = 80, 100


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        MedsegError: an unknown name; the message gives the nearest one and lists all.
    """
    parser = argparse.ArgumentParser(
        prog="python -m medseg_reg.regularizers",
        description="List the regularizers, or describe one.",
    )
    parser.add_argument("name", nargs="?", help="describe this one alone")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        found = (catalogue.entry(options.name),) if options.name else catalogue.entries()
    except ValueError as error:
        raise MedsegError(str(error)) from None
    if options.json:
        text = catalogue.as_json(found)
    elif options.name:
        text = catalogue.describe(options.name)
    else:
        columns = shutil.get_terminal_size((_MAX_WIDTH, 24)).columns
        text = catalogue.as_table(found, min(max(columns, _MIN_WIDTH), _MAX_WIDTH))
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    run_main(main)
