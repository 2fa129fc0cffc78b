"""Which cases a run learns from, told by what they hold, so that a later run can ask for its own.

seen.json    the cases that a run is trained and validated on, with their hashes
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from medseg_reg.data.splits import Splits, units_of
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.run_directory import RunDirectory, manifest_hash
from medseg_reg.errors import MedsegError
from medseg_reg.files import read_json, write_json

NAME = "seen.json"


class SeenCase(BaseModel):
    """A case: its patient or video, how many of its slices were used, and its hashes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    group: str
    slices: int
    image_sha256: str
    source_sha256: str

    @property
    def hashes(self) -> set[str]:
        """What tells it in another store: its images as converted, and the files they were in."""
        return {self.image_sha256, self.source_sha256}


class Shared(NamedTuple):
    """Cases of a run that another one knows.

    Attributes:
        test: cases of the test part that it was trained or validated on.
        val: cases of the validation part that it was trained on.
    """

    test: tuple[str, ...]
    val: tuple[str, ...]


class Seen(BaseModel):
    """The cases of a run, as written to seen.json.

    Attributes:
        manifest_sha256: of the store.
        slices_per_epoch: drawn for an epoch of the training, if that is known.
        train: the cases of which at least one slice is trained on.
        val: those that are validated on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    manifest_sha256: str
    slices_per_epoch: int | None = None
    train: dict[str, SeenCase]
    val: dict[str, SeenCase]

    @classmethod
    def of(cls, store: SliceStore, splits: Splits, slices_per_epoch: int | None = None) -> Seen:
        """Gather what a split lets a run see."""
        drawn = splits.train_slices or {}
        counts = {c: len(drawn[c]) if c in drawn else store.row(c).slices for c in splits.train}
        return cls(
            manifest_sha256=manifest_hash(store),
            slices_per_epoch=slices_per_epoch,
            train=_cases(store, {case: count for case, count in counts.items() if count}),
            val=_cases(store, {case: store.row(case).slices for case in splits.val}),
        )

    @property
    def hash(self) -> str:
        """16 hex digits that change when, and only when, other images are seen."""
        content = {
            part: sorted((one.image_sha256, one.slices) for one in cases.values())
            for part, cases in (("train", self.train), ("val", self.val))
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def write(self, folder: Path) -> None:
        """Write seen.json into a run directory, whole or not at all."""
        write_json(folder / NAME, {**self.model_dump(mode="json"), "hash": self.hash})

    def shared(self, splits: Splits, store: SliceStore) -> Shared:
        """Return the cases of another run that this one knows.

        A case is known where one of its patient, or one with an identical slice, is. In another
        store cases are told by the hashes of their images and of the files that these came from,
        as far as a hash is that of one patient alone; their names say nothing there.
        """
        unit = {case: name for name, cases in units_of(store).items() for case in cases}
        learned = {unit[case] for case in self._in(store, self.train)}
        known = learned | {unit[case] for case in self._in(store, self.val)}
        return Shared(
            tuple(case for case in splits.test if unit[case] in known),
            tuple(case for case in splits.val if unit[case] in learned),
        )

    def _in(self, store: SliceStore, cases: Mapping[str, SeenCase]) -> Iterable[str]:
        """Go through the cases of a store that are some of those seen."""
        if self.manifest_sha256 == manifest_hash(store):
            return cases
        mine = _cases(store, {row.name: row.slices for row in store.manifest.cases})
        telling = _telling(mine.values()) & _telling([*self.train.values(), *self.val.values()])
        wanted = {one for case in cases.values() for one in case.hashes} & telling
        return [name for name, case in mine.items() if case.hashes & wanted]


def _cases(store: SliceStore, counts: Mapping[str, int]) -> dict[str, SeenCase]:
    """Return what tells some cases; `counts` has how many of their slices are used."""
    rows = {case: store.row(case) for case in counts}
    return {
        case: SeenCase(
            group=row.group,
            slices=counts[case],
            image_sha256=row.image_sha256,
            source_sha256=row.source_sha256,
        )
        for case, row in rows.items()
    }


def _telling(cases: Iterable[SeenCase]) -> set[str]:
    """Return the hashes that one patient alone has; that of no file, for example, tells nothing."""
    groups: dict[str, set[str]] = {}
    for case in cases:
        for one in case.hashes:
            groups.setdefault(one, set()).add(case.group)
    return {one for one, found in groups.items() if len(found) == 1}


def read_seen(run: RunDirectory, store: SliceStore) -> Seen | None:
    """Return what a run has seen; None where that is not known.

    One from before there was a seen.json has its split, which says so for the same store.

    Raises:
        MedsegError: a file of the run is damaged.
    """
    path = run.path / NAME
    if path.exists():
        content = read_json(path)
        if isinstance(content, dict):
            content.pop("hash", None)
        try:
            return Seen.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise MedsegError(f"{path}: is damaged: '{key}': {first['msg']}.") from None
    if run.data_facts().manifest_sha256 != manifest_hash(store):
        return None
    splits = run.splits(store)
    return None if splits is None else Seen.of(store, splits)
