"""Where what a run takes over from others comes from: what that has cost, and which cases it knows.

A teacher, a coarse run and pretrained weights bring along what they were trained on. Labels of
cases by which a run is judged make its scores worthless, so they are refused. Images of them
without labels, as a pre-training may have seen, are a fair but another question, so they are told.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from medseg_reg.config import RunConfig, kind_of
from medseg_reg.config_file import read_yaml
from medseg_reg.data.splits import Splits
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.metrics_table import MetricsTable
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.engine.seen import read_seen
from medseg_reg.errors import MedsegError
from medseg_reg.files import read_json, sha256_of

Kind = Literal["teacher", "coarse", "pre-training", "training", "file"]
_WORDS = {
    "teacher": "a teacher",
    "coarse": "a coarse run whose answer is taken in",
    "pre-training": "a pre-training without labels",
    "training": "a training with labels",
    "file": "a file of which no more is known",
}


@dataclass(frozen=True)
class Origin:
    """What was learned elsewhere.

    Attributes:
        kind: a `teacher`; a `coarse` run whose answer is taken in; weights of a `pre-training`
            without labels, of a `training` with labels, or of a `file` of which no more is known.
        path: the run directory, or the file.
        epochs: of its training; None where that is not known, as for the next ones.
        slices: drawn for each epoch.
        cases: that it was trained on.
        test: cases of the test part of the run that learns from it that it knows, see `Shared`.
        val: likewise of the validation part.
        tested: how many cases that test part has.
        validated: likewise the validation part.
        before: what it has learned elsewhere itself.
    """

    kind: Kind
    path: str
    epochs: int | None = None
    slices: int | None = None
    cases: tuple[str, ...] | None = None
    test: tuple[str, ...] | None = None
    val: tuple[str, ...] | None = None
    tested: int = 0
    validated: int = 0
    before: tuple[Origin, ...] = ()

    def all(self) -> Iterator[Origin]:
        """Go through this and what was before it."""
        yield self
        for one in self.before:
            yield from one.all()

    @property
    def labelled(self) -> bool:
        """Whether it has seen labels."""
        return self.kind in ("teacher", "coarse", "training")

    def __str__(self) -> str:
        """Say it in plain words.

        >>> cases = ("a", "b", "c", "d")
        >>> found = Origin("pre-training", "runs/mae", 40, 96, cases, ("d",), (), 3, 1)
        >>> print(found)  # doctest: +NORMALIZE_WHITESPACE
        runs/mae is a pre-training without labels (epochs: 40, slices in each: 96, cases: 4). It has
        seen the images of 1 of the 3 test cases, without labels (d): the scores hold for patients
        whose images are at hand before.
        """
        parts = [
            *([f"epochs: {self.epochs}"] if self.epochs is not None else []),
            *([f"slices in each: {self.slices}"] if self.slices is not None else []),
            *([f"cases: {len(self.cases)}"] if self.cases is not None else []),
        ]
        text = f"{self.path} is {_WORDS[self.kind]}" + (f" ({', '.join(parts)})" if parts else "")
        text += f". {self._shared()}."
        for one in self.before:
            text += f" Before that: {one}"
        return text

    def _shared(self) -> str:
        if self.test is None:
            return f"Whether it has seen any of the {self.tested} test cases is not known"
        how = "with" if self.labelled else "without"
        text = f"It has seen none of the {self.tested} test cases"
        if self.test:
            text = (
                f"It has seen the images of {len(self.test)} of the {self.tested} test cases, "
                f"{how} labels ({shown(self.test)})"
            )
        if self.val:
            text += f", and {len(self.val)} of the {self.validated} validation cases"
        if self.test and not self.labelled:
            text += ": the scores hold for patients whose images are at hand before"
        return text

    def as_dict(self) -> dict[str, Any]:
        """Return plain types, and what they say in words."""
        return {**asdict(self), "said": str(self)}


def shown(cases: tuple[str, ...]) -> str:
    """Return the first names of cases."""
    return ", ".join(cases[:3]) + (", ..." if len(cases) > 3 else "")


def origin_of_run(
    run: RunDirectory,
    kind: Kind,
    splits: Splits,
    store: SliceStore,
    known: frozenset[Path] = frozenset(),
) -> Origin:
    """Return what a run brings along for another one.

    Args:
        run: from which is learned.
        kind: what it is.
        splits: of the run that learns.
        store: of that run.
        known: runs that were looked at on the way to this one.

    Raises:
        MedsegError: a file of the run is damaged.
    """
    seen, table = read_seen(run, store), run.path / "metrics.csv"
    rows = MetricsTable.read(table) if table.exists() else []
    shared = None if seen is None else seen.shared(splits, store)
    return Origin(
        kind,
        str(run.path),
        epochs=int(rows[-1]["epoch"]) if rows else None,
        slices=None if seen is None else seen.slices_per_epoch,
        cases=None if seen is None else tuple(seen.train),
        test=None if shared is None else shared.test,
        val=None if shared is None else shared.val,
        tested=len(splits.test),
        validated=len(splits.val),
        before=tuple(_before(run, splits, store, known | {run.path.resolve()})),
    )


def _before(
    run: RunDirectory, splits: Splits, store: SliceStore, known: frozenset[Path]
) -> Iterator[Origin]:
    """Go through what a run has learned elsewhere, as far as that is still what it was."""
    tested, validated = len(splits.test), len(splits.val)
    teacher, pretrained = (run.path / name for name in ("teacher.json", "pretrained.json"))
    if teacher.exists():
        note = read_json(teacher)
        other = RunDirectory(Path(note["run"]))
        if _is_still(other.weights, note) and other.path.resolve() not in known:
            yield origin_of_run(other, "teacher", splits, store, known)
        else:
            yield Origin("teacher", note["run"], tested=tested, validated=validated)
    if run.coarse.path.exists():  # a copy, which no other run can hold
        yield origin_of_run(run.coarse, "coarse", splits, store, known)
    if pretrained.exists():
        note = read_json(pretrained)
        path = Path(note["file"])
        if _is_still(path, note):
            yield origin_of_file(path, splits, store, known)
        else:
            yield Origin("file", note["file"], tested=tested, validated=validated)


def _is_still(weights: Path, note: Any) -> bool:
    return weights.is_file() and sha256_of(weights) == note.get("sha256")


def origin_of_file(
    path: Path, splits: Splits, store: SliceStore, known: frozenset[Path] = frozenset()
) -> Origin:
    """Return what a file of weights brings along: those of a run lie in its directory.

    Arguments as of `origin_of_run`.
    """
    for folder in (path.parent, path.parent.parent):
        if (folder / "config.yaml").is_file() and (folder / "data.json").is_file():
            if folder.resolve() in known:
                break
            content, _ = read_yaml(folder / "config.yaml")
            unlabelled = kind_of(content) == "pre-training"
            kind: Kind = "pre-training" if unlabelled else "training"
            return origin_of_run(RunDirectory(folder), kind, splits, store, known)
    return Origin("file", str(path), tested=len(splits.test), validated=len(splits.val))


def require_unlearned(origin: Origin) -> None:
    """Refuse what has learned from the labels of cases by which a run is judged.

    Raises:
        MedsegError: names the run that has, and the cases.
    """
    for one in origin.all():
        for part, cases in (("test", one.test), ("val", one.val)):
            if one.labelled and cases:
                raise MedsegError(
                    f"{one.path}: has learned from {shown(cases)}, which this run keeps for "
                    f"'{part}': its scores would tell nothing. Train it with the same data.split."
                )


def weights_origin(
    config: RunConfig, splits: Splits, store: SliceStore, *, judged: bool = True
) -> Origin | None:
    """Return where the pretrained weights that a configuration names come from, if it names any.

    Args:
        config: of the run that takes them.
        splits: of that run.
        store: of that run.
        judged: whether it is judged by its test cases, so that labels of these are refused.

    Raises:
        MedsegError: they come from a training with labels that has learned from cases that this
            run validates or tests on; or `network.pretrained_unseen` asks for weights that have
            seen no test case, and these have, or it is not known.
    """
    path = config.network.encoder_weights or config.network.pretrained
    if path is None:
        return None
    key = "network.encoder_weights" if config.network.encoder_weights else "network.pretrained"
    try:
        origin = origin_of_file(path, splits, store)
        if judged:
            require_unlearned(origin)
    except MedsegError as error:
        raise MedsegError(f"{key}: {error}") from None
    for one in origin.all():
        if config.network.pretrained_unseen and one.test != ():
            why = "whether it has seen test cases of this run is not known"
            if one.test is not None:
                why = f"has seen images of {shown(one.test)}, which this run keeps for 'test'"
            raise MedsegError(
                f"{key}: {one.path}: {why}, and network.pretrained_unseen is true. Pre-train with "
                "the same data.split, or leave that key out."
            )
    return origin
