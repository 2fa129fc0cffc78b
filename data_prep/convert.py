"""What all converters share: the command line, the worker processes, the summary.

A converter says which files make which case (`CaseSource`) and how to read one (`Reader`);
everything else -- progress, resuming, hashing, errors, the table at the end -- happens here.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from medseg_reg.data.store import CASE_NAME, CaseRow, Description, SliceStore
from medseg_reg.data.store_writer import CaseArrays, CaseSource, StoreWriter
from medseg_reg.errors import MedsegError
from medseg_reg.files import require_space, sha256_of

Reader = Callable[[CaseSource], CaseArrays]
# With an ending, it still fits into the 255 bytes that file systems allow; `CaseRow` says the same.
MAX_CASE_NAME = 200


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every converter has."""
    parser.add_argument("--out", type=Path, required=True, help="the slice store to write")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(os.cpu_count() or 1, 8),
        help="processes that convert cases side by side (default: the cores, 8 at most)",
    )
    parser.add_argument(
        "--skip", nargs="+", default=[], metavar="CASE", help="names of cases to leave out"
    )


def add_ignore_argument(parser: argparse.ArgumentParser, where: str) -> None:
    """Add the option that names pixels of no known class; `where` says what holds the value."""
    parser.add_argument(
        "--ignore-label",
        type=int,
        metavar="VALUE",
        help=f"value in the {where} of pixels whose class is not known; it is kept, and training "
        "and evaluation leave them out with data.ignore_label",
    )


def check_ignore_label(value: int | None, classes: Sequence[str]) -> None:
    """Refuse a value that a store cannot keep beside its classes.

    Raises:
        MedsegError: names the value, and those that are possible.
    """
    if value is None or len(classes) <= value <= 255:
        return
    meaning = f" is the class '{classes[value]}'" if 0 <= value < len(classes) else ""
    raise MedsegError(
        f"--ignore-label {value}{meaning}: expected a value from {len(classes)} to 255, beyond the "
        f"classes {list(classes)}. Renumber it in the masks; 255 is usual."
    )


def ignored_setting(value: int | None) -> dict[str, int]:
    """Return the setting of a store; stores without ignored pixels have none."""
    return {} if value is None else {"ignore_label": value}


def with_background(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of all classes; the background comes first, named or not.

    >>> with_background(["pancreas"])
    ('background', 'pancreas')
    """
    named = bool(names) and names[0].lower() == "background"
    return tuple(names) if named else ("background", *names)


def convert(
    sources: Sequence[CaseSource],
    read: Reader,
    description: Description,
    arguments: argparse.Namespace,
    settings: dict[str, Any],
    tell: Callable[[str], None] = print,
) -> SliceStore:
    """Convert all cases into the slice store `arguments.out`, or go on where a run stopped.

    Args:
        sources: the cases, in the order of the manifest.
        read: reads one case; must be picklable (a function, or a `functools.partial` of one).
        description: what the data are.
        arguments: what `add_common_arguments` parsed.
        settings: every option that decides what is written, plain JSON types alone.
        tell: gets what a user is told: what was there already, and the summary of the store.

    Raises:
        MedsegError: nothing to convert, or cases that could not be read. The cases that could
            be read are kept, so that the same command goes on after the repair.
    """
    sources = _without(sources, arguments.skip)
    selection = {"skip": sorted(arguments.skip), "sources": _fingerprint(sources)}
    writer = StoreWriter(arguments.out, description, settings, selection)
    if (store := writer.finished()) is not None:
        tell(
            f"{arguments.out}: is already complete ({len(store.rows)} cases); nothing to do: the "
            "sources have the same names and sizes; their contents were not compared."
        )
        return store
    try:
        writer.begin()
        todo = [source for source in sources if not writer.has(source)]
        if there := len(sources) - len(todo):
            tell(f"{arguments.out}: going on; {_cases(there)} {_are(there)} already there.")
        failures = _convert_all(todo, read, writer, arguments.workers)
    finally:
        writer.discard_if_empty()
    if failures:
        raise _told_together(failures, kept=sum(writer.has(source) for source in sources))
    store = writer.publish([source.name for source in sources])
    tell(summary(store))
    return store


def _convert_all(
    todo: Sequence[CaseSource], read: Reader, writer: StoreWriter, workers: int
) -> dict[str, MedsegError]:
    """Convert cases; return by name what went wrong. A full disk or a stop ends it at once."""
    failures: dict[str, MedsegError] = {}
    space = _Space(writer.out.parent, todo)
    with tqdm(total=len(todo), unit="case", disable=not todo) as bar:

        def settle(source: CaseSource, row: Callable[[], CaseRow]) -> None:
            try:
                made = row()
            except MedsegError as failure:
                failures[source.name] = failure
                space.left_out(source)
            else:
                space.written(source, made)
            bar.update()

        if workers <= 1 or len(todo) <= 1:
            for source in todo:
                settle(source, partial(convert_one, source, read, writer))
            return failures
        # Spawned, not forked: a forked child of a process with threads can deadlock.
        context = multiprocessing.get_context("spawn")
        count = min(workers, len(todo))
        with _terminable(), ProcessPoolExecutor(count, context, _die_with_parent) as pool:
            waiting = {pool.submit(convert_one, source, read, writer): source for source in todo}
            try:
                for future in as_completed(waiting):
                    settle(waiting[future], future.result)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return failures


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end a conversion as Ctrl-C does, so that its workers end too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _die_with_parent() -> None:
    """End this worker when the process that started it has been killed."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Space:
    """Whether the disk has room for the cases to come, judged by the first one written.

    Compressed sources grow by a factor that no one knows before, but that is much alike for all
    cases of a data set.
    """

    def __init__(self, folder: Path, todo: Sequence[CaseSource]) -> None:
        uses = Counter(file for source in todo for file in source.files)
        self.folder = folder
        # A file of many cases, such as a zip of all labels, says nothing about any one of them.
        self.size = {
            source.name: sum(file.stat().st_size for file in source.files if uses[file] == 1)
            for source in todo
        }
        self.judged = False
        require_space(folder, sum(self.size.values()))

    def left_out(self, source: CaseSource) -> None:
        """Forget a case that will not be written."""
        self.size.pop(source.name)

    def written(self, source: CaseSource, row: CaseRow) -> None:
        """Refuse to go on if cases like this one will not fit."""
        own = self.size.pop(source.name)
        if not self.judged and own:
            mask = math.prod(row.shape[:3])
            image = math.prod(row.shape) * np.dtype(row.dtype).itemsize
            require_space(self.folder, (image + mask) * sum(self.size.values()) // own)
        self.judged = True


def _told_together(failures: dict[str, MedsegError], kept: int) -> MedsegError:
    """Return one error for all: the first in full, the others by name."""
    names = list(failures)
    text = [str(failures[names[0]])]
    if others := names[1:]:
        text.append(f"Not converted either: {_listed(others)}.")
    if kept:
        text.append(f"{_cases(kept)} {_are(kept)} kept; repair, then run again.")
    return MedsegError("\n".join([text[0], " ".join(text[1:])]).strip())


def convert_one(source: CaseSource, read: Reader, writer: StoreWriter) -> CaseRow:
    """Read, check, hash and write one case; an error names the case."""
    # The hash of the source needs no interpreter, so it is taken while the case is read.
    with ThreadPoolExecutor(1) as pool:
        source_sha256 = pool.submit(sha256_of, *source.files)
        try:
            arrays = read(source)
            return writer.write(source, arrays, source_sha256.result())
        except MedsegError as error:
            text = str(error)
            raise MedsegError(
                text if source.name in text else f"case {source.name}: {text}"
            ) from None


def _without(sources: Sequence[CaseSource], skip: Sequence[str]) -> list[CaseSource]:
    names = [source.name for source in sources]
    for name in skip:
        if name not in names:
            raise MedsegError(f"--skip {name}: no such case. The cases are {_listed(names)}.")
    kept = [source for source in sources if source.name not in skip]
    if not kept:
        raise MedsegError("there is nothing to convert: no case was found, or all were skipped.")
    _check_names(kept)
    return kept


def _check_names(sources: Sequence[CaseSource]) -> None:
    """Refuse names that a store must not hold; they become the names of its files."""
    found: dict[str, CaseSource] = {}
    for source in sources:
        if re.fullmatch(CASE_NAME, source.name) is None or len(source.name) > MAX_CASE_NAME:
            raise MedsegError(
                f"{_first_file(source)}: would make a case named {source.name[:80]!r}. Expected "
                f"at most {MAX_CASE_NAME} of the letters A-Z a-z 0-9 . _ -, the first a letter or "
                "a digit; name it so."
            )
        if (other := found.setdefault(source.name, source)) is not source:
            raise MedsegError(
                f"{_first_file(source)}: would make the same case {source.name} as "
                f"{_first_file(other)}. Rename one of them."
            )


def _first_file(source: CaseSource) -> str:
    return str(source.files[0]) if source.files else f"case {source.name}"


def _fingerprint(sources: Sequence[CaseSource]) -> str:
    return hashlib.sha256("".join(s.fingerprint() for s in sources).encode()).hexdigest()[:16]


def _cases(count: int) -> str:
    return f"{count} case{'s' * (count != 1)}"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" ... ({len(names)} in all)" if len(names) > 8 else "")


def _notes(store: SliceStore) -> list[tuple[str, str]]:
    """Return every note once, with the cases that it is on."""
    cases: dict[str, list[str]] = {}
    for row in store.manifest.cases:
        for note in row.notes:
            cases.setdefault(note, []).append(row.name)
    return [
        (f"note on {names[0] if len(names) == 1 else f'{len(names)} cases'}", note)
        for note, names in cases.items()
    ]


def _channels(rows: Sequence[CaseRow]) -> str:
    counts = sorted({row.channels for row in rows})
    return f"{' or '.join(map(str, counts))} channel{'s' * (counts != [1])}"


def summary(store: SliceStore) -> str:
    """Return the table that ends a conversion."""
    rows = store.manifest.cases
    slices = sum(row.slices for row in rows)
    filled = sum(sum(count > 0 for count in row.foreground) for row in rows)
    size = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())
    shapes = sorted({"x".join(map(str, row.shape[1:3])) for row in rows})
    dtypes = " or ".join(sorted({row.dtype for row in rows}))
    parts = sorted({row.part for row in rows if row.part})
    lines = [
        ("store", str(store.path)),
        ("cases", f"{len(rows)} of {len({row.group for row in rows})} patients or videos"),
        ("slices", f"{slices}, {filled} with foreground ({filled / slices:.0%})"),
        ("slice sizes", _listed(shapes)),
        ("classes", ", ".join(f"{i} {name}" for i, name in enumerate(store.classes))),
        *([("ignored", f"label {ignored}")] if (ignored := store.ignore_label) else []),
        ("pixels", f"{dtypes}, {store.manifest.description.unit}, {_channels(rows)}"),
        ("size", f"{size / 1e6:.1f} MB"),
    ]
    for part in parts:
        lines.append((f"official {part}", f"{sum(row.part == part for row in rows)} cases"))
    lines += [("note", note) for note in store.manifest.description.notes]
    lines += _notes(store)
    lines.append(("look at", str(store.path / "overview.png")))
    width = max(len(key) for key, _ in lines)
    return "\n".join(f"{key.ljust(width)}  {value}" for key, value in lines)
