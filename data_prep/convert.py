"""What all converters share: the command line, the worker processes, the summary.

A converter says which files make which case (`CaseSource`) and how to read one (`Reader`);
everything else -- progress, resuming, hashing, errors, the table at the end -- happens here.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medseg_reg.data.store import CaseRow, Description, SliceStore
from medseg_reg.data.store_writer import CaseArrays, CaseSource, StoreWriter
from medseg_reg.errors import MedsegError
from medseg_reg.files import require_space, sha256_of

Reader = Callable[[CaseSource], CaseArrays]


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
) -> SliceStore:
    """Convert all cases into the slice store `arguments.out`, or go on where a run stopped.

    Args:
        sources: the cases, in the order of the manifest.
        read: reads one case; must be picklable (a function, or a `functools.partial` of one).
        description: what the data are.
        arguments: what `add_common_arguments` parsed.
        settings: every option that decides what is written, plain JSON types alone.

    Raises:
        MedsegError: nothing to convert, or cases that could not be read. The cases that could
            be read are kept, so that the same command goes on after the repair.
    """
    sources = _without(sources, arguments.skip)
    settings = {**settings, "skip": sorted(arguments.skip), "sources": _fingerprint(sources)}
    writer = StoreWriter(arguments.out, description, settings)
    if (store := writer.finished()) is not None:
        print(f"{arguments.out}: is already complete ({len(store.rows)} cases); nothing to do.")
        return store
    require_space(arguments.out.parent, sum(f.stat().st_size for s in sources for f in s.files))
    writer.begin()
    todo = [source for source in sources if not writer.has(source.name)]
    if len(todo) < len(sources):
        print(f"{arguments.out}: going on; {len(sources) - len(todo)} cases are already there.")
    try:
        failures = _convert_all(todo, read, writer, arguments.workers)
    finally:
        writer.discard_if_empty()
    if failures:
        kept = sum(writer.has(source.name) for source in sources)
        shown = "\n".join(str(failure) for failure in failures[:3])
        more = f"\n... and {len(failures) - 3} more cases" if len(failures) > 3 else ""
        raise MedsegError(
            f"{shown}{more}" + (f"\n{kept} cases are kept; repair, then run again." if kept else "")
        )
    store = writer.publish([source.name for source in sources])
    print(summary(store))
    return store


def _convert_all(
    todo: Sequence[CaseSource], read: Reader, writer: StoreWriter, workers: int
) -> list[MedsegError]:
    """Convert cases and return what went wrong; a full disk or a stop ends it at once."""
    failures: list[MedsegError] = []
    with tqdm(total=len(todo), unit="case", disable=not todo) as bar:
        if workers <= 1 or len(todo) <= 1:
            for source in todo:
                try:
                    convert_one(source, read, writer)
                except MedsegError as failure:
                    failures.append(failure)
                bar.update()
            return failures
        # Spawned, not forked: a forked child of a process with threads can deadlock.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(todo)), mp_context=context) as pool:
            waiting: set[Future[CaseRow]] = {
                pool.submit(convert_one, source, read, writer) for source in todo
            }
            try:
                while waiting:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        try:
                            future.result()
                        except MedsegError as failure:
                            failures.append(failure)
                        bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return failures


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
    repeated = {name for name, count in Counter(names).items() if count > 1}
    if repeated:
        raise MedsegError(f"two sources would make the same case: {_listed(sorted(repeated))}.")
    return kept


def _fingerprint(sources: Sequence[CaseSource]) -> str:
    """Return a hash of the cases and the names and sizes of their files, cheap to ask for."""
    digest = hashlib.sha256()
    for source in sources:
        files = [(file.name, file.stat().st_size) for file in source.files]
        digest.update(repr((source.name, source.group, source.part, files)).encode())
    return digest.hexdigest()[:16]


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
        ("pixels", f"{dtypes}, {store.manifest.description.unit}"),
        ("size", f"{size / 1e6:.1f} MB"),
    ]
    for part in parts:
        lines.append((f"official {part}", f"{sum(row.part == part for row in rows)} cases"))
    lines += _notes(store)
    lines.append(("look at", str(store.path / "overview.png")))
    width = max(len(key) for key, _ in lines)
    return "\n".join(f"{key.ljust(width)}  {value}" for key, value in lines)
