"""Which cases train, validate and test: by patient or video, never by slice.

    splits.json    the names of the cases of each part, how they were drawn, and a hash

Three rules hold for every split, drawn or given: all cases of a group lie in one part; cases
that share an identical slice count as one group, whatever their names say; and an official test
part of the data set is exactly the test part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from medseg_reg.data.split_spec import DEFAULT_FOLDS, PARTS, SplitSpec, apportion
from medseg_reg.data.store import SliceStore
from medseg_reg.errors import MedsegError, nearest
from medseg_reg.files import read_json, write_json

__all__ = ["SplitSpec", "Splits", "check_splits", "make_splits", "read_splits", "units_of"]


class Splits(BaseModel):
    """The division of a store, as written to splits.json.

    Attributes:
        train: names of the cases to train on, sorted; likewise `val` and `test`.
        unused: names of the cases that take no part.
        train_slices: for each training case the indices of the slices to use; None uses all.
        method: in words, how the cases were divided.
        seed: the seed of the draw; None for a file made by hand.
        notes: what a person should know of this split.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    unused: tuple[str, ...] = ()
    train_slices: dict[str, tuple[int, ...]] | None = None
    method: str = "file"
    seed: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """16 hex digits that change when, and only when, a case or slice changes its part."""
        content: dict[str, Any] = {part: sorted(getattr(self, part)) for part in PARTS}
        if self.train_slices is not None:
            content["train_slices"] = {c: sorted(n) for c, n in self.train_slices.items()}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def write(self, path: Path) -> None:
        """Write splits.json, whole or not at all."""
        write_json(path, {**self.model_dump(mode="json"), "hash": self.hash})


def make_splits(store: SliceStore, spec: SplitSpec, seed: int | None = None) -> Splits:
    """Divide the cases of a store; the same on every machine for the same spec and seed.

    Args:
        store: the store to divide.
        spec: how to divide it.
        seed: overrides `spec.seed`.

    Raises:
        MedsegError: a part would be empty, there are too few groups, or the file is refused.
    """
    seed = spec.seed if seed is None else seed
    if spec.kind == "file":
        splits = read_splits(Path(spec.file or ""), store)
        if spec.train_frames is not None and splits.train_slices is not None:
            raise MedsegError(
                f"{spec.file}: has 'train_slices' already, so train_frames "
                f"{spec.train_frames} cannot be drawn. Leave one of them out."
            )
    else:
        splits = _draw(store, spec, seed)
    if spec.train_frames is not None:
        slices = _draw_slices(store, splits.train, spec.train_frames, seed)
        method = f"{splits.method}; {spec.train_frames} random training slices"
        splits = splits.model_copy(update={"train_slices": slices, "method": method, "seed": seed})
    check_splits(splits, store)
    return splits


def read_splits(path: Path, store: SliceStore) -> Splits:
    """Read and check a splits.json, written by `Splits.write` or by hand.

    Raises:
        MedsegError: the file is damaged, was changed after its hash was written, or breaks a
            rule of `check_splits`.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise MedsegError(f"{path}: holds no mapping with the lists train, val and test.")
    stated = content.pop("hash", None)
    try:
        splits = Splits.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        hint = nearest(key, Splits.model_fields)
        raise MedsegError(f"{path}: {key}: {first['msg']}.{hint}") from None
    if stated is not None and stated != splits.hash:
        raise MedsegError(
            f"{path}: its hash is {stated}, its content has {splits.hash}: it was changed after "
            "it was written. If you meant to, delete the line 'hash'."
        )
    try:
        check_splits(splits, store)
    except MedsegError as error:
        raise MedsegError(f"{path}: {error}") from None
    return splits


def check_splits(splits: Splits, store: SliceStore) -> None:
    """Refuse a split that leaks, misses or invents cases, has an empty part, or moves the test.

    Unused cases may share a group or slices with used ones: leaving a duplicate out is a use
    of `unused`.

    Raises:
        MedsegError: naming the cases.
    """
    part_of: dict[str, str] = {}
    for part in (*PARTS, "unused"):
        for case in getattr(splits, part):
            if case not in store.rows:
                raise MedsegError(
                    f"{part} names the case '{case}', which {store.path} does not have."
                    f"{nearest(case, store.rows)}"
                )
            if case in part_of:
                raise MedsegError(f"case '{case}' stands in {part_of[case]} and in {part}.")
            part_of[case] = part
    if missing := [case for case in store.rows if case not in part_of]:
        raise MedsegError(
            f"no part has {_listed(missing)}. Add them to train, val or test, or to 'unused'."
        )
    for part in PARTS:
        if not getattr(splits, part):
            raise MedsegError(f"the part {part} is empty; each of train, val, test needs a case.")
    _check_official(part_of, store)
    _check_leaks(part_of, store)
    _check_slices(splits, store)


def _check_official(part_of: dict[str, str], store: SliceStore) -> None:
    official = _official_test(store)
    if not official:
        return
    if moved := sorted(case for case in official if part_of[case] != "test"):
        raise MedsegError(
            f"{_listed(moved)}: in the data set's official test part, but in "
            f"{part_of[moved[0]]} here. The test part must be the official one."
        )
    if added := sorted(c for c, p in part_of.items() if p == "test" and c not in official):
        raise MedsegError(
            f"{_listed(added)}: in test here, but not in the data set's official test part. The "
            "test part must be the official one."
        )


def _check_leaks(part_of: dict[str, str], store: SliceStore) -> None:
    first_of_group: dict[str, str] = {}
    first_of_slice: dict[str, str] = {}
    for row in store.manifest.cases:
        part = part_of[row.name]
        if part == "unused":
            continue
        other = first_of_group.setdefault(row.group, row.name)
        if part_of[other] != part:
            raise MedsegError(
                f"'{other}' in {part_of[other]} and '{row.name}' in {part} are of one patient or "
                f"video, '{row.group}'. Put them into one part, or one into 'unused'."
            )
        for number, digest in enumerate(row.slice_hashes):
            if digest is None:
                continue
            other = first_of_slice.setdefault(digest, row.name)
            if part_of[other] != part:
                raise MedsegError(
                    f"'{other}' in {part_of[other]} and '{row.name}' in {part} share an identical "
                    f"slice (number {number} of the latter). Put them into one part, or one into "
                    "'unused'."
                )


def _check_slices(splits: Splits, store: SliceStore) -> None:
    slices = splits.train_slices
    if slices is None:
        return
    if set(slices) != set(splits.train):
        odd = sorted(set(slices) ^ set(splits.train))
        raise MedsegError(
            f"train_slices must name the training cases, each once; {_listed(odd)} differ. A "
            "case of which no slice is used has an empty list."
        )
    for case, numbers in slices.items():
        count = store.row(case).slices
        if len(set(numbers)) != len(numbers) or any(not 0 <= n < count for n in numbers):
            raise MedsegError(
                f"train_slices of '{case}' must be different numbers from 0 to {count - 1}."
            )
    if not any(slices.values()):
        raise MedsegError("train_slices leaves no slice to train on.")


def units_of(store: SliceStore) -> dict[str, tuple[str, ...]]:
    """Return the cases that must stay together, by the smallest group name among them.

    Cases stay together when they are of one group, or share a slice that is identical byte for
    byte; slices of one flat value say nothing and are ignored.
    """
    parent: dict[str, str] = {row.name: row.name for row in store.manifest.cases}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    owner: dict[tuple[str, str], str] = {}
    for row in store.manifest.cases:
        keys = [("group", row.group)] + [("slice", h) for h in row.slice_hashes if h is not None]
        for key in keys:
            parent[root(row.name)] = root(owner.setdefault(key, row.name))
    members: dict[str, list[str]] = {}
    for case in store.rows:
        members.setdefault(root(case), []).append(case)
    named = {min(store.row(c).group for c in cases): cases for cases in members.values()}
    return {name: tuple(sorted(named[name])) for name in sorted(named)}


def _draw(store: SliceStore, spec: SplitSpec, seed: int) -> Splits:
    """Divide the units of a store at random."""
    official = _official_test(store)
    if official and spec.test:
        raise MedsegError(
            f"data.split.test is {spec.test:g}, but {store.path} has an official test part of "
            f"{len(official)} cases, which is the test part. Leave data.split.test out."
        )
    units, notes, dropped = [], [], []
    for name, cases in units_of(store).items():
        inside = [case for case in cases if case in official]
        if inside and (outside := [case for case in cases if case not in official]):
            dropped.extend(outside)
            notes.append(
                f"{_listed(outside)}: left unused, of one group or with identical slices as "
                f"{_listed(inside)} of the official test part"
            )
        elif not inside:
            units.append((name, cases))
            if len({store.row(case).group for case in cases}) > 1:
                notes.append(f"{_listed(cases)}: kept together, they share identical slices")
    if dropped and len(units) < 2:
        raise MedsegError(f"{store.path}: too little is left to train on.\n{notes[0]}")
    # Sorted names and a named generator: the order of the manifest plays no role.
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(units))
    shuffled = [units[index][1] for index in order]
    if spec.kind == "kfold":
        parts, method = _folds(shuffled, spec, bool(official), store)
    else:
        sizes, method = _sizes(len(shuffled), spec, bool(official), store)
        ends = np.cumsum(sizes)
        parts = [shuffled[end - size : end] for size, end in zip(sizes, ends, strict=True)]
        parts.append(shuffled[ends[-1] :])
    train, val, test, unused = (_cases(part) for part in parts)
    return Splits(
        train=train,
        val=val,
        test=tuple(sorted(official)) if official else test,
        unused=tuple(sorted((*unused, *dropped))),
        method=method + (", official test part" if official else ""),
        seed=seed,
        notes=tuple(notes),
    )


def _folds(
    units: list[tuple[str, ...]], spec: SplitSpec, official: bool, store: SliceStore
) -> tuple[list[Sequence[tuple[str, ...]]], str]:
    """Return the units of train, val, test and unused for one fold of a cross-validation."""
    count, fold = spec.folds or DEFAULT_FOLDS, spec.fold or 0
    if len(units) < (needed := 2 if official else 3):
        raise _too_few(store, len(units), needed, official)
    if len(units) < count:
        raise MedsegError(
            f"{store.path}: {count} folds need {count} patients or videos, there are "
            f"{len(units)} to divide. Set split.folds to {len(units)} or less."
        )
    folds = [units[start::count] for start in range(count)]
    method = f"fold {fold} of {count}"
    if official and spec.val is not None:
        raise MedsegError(
            f"data.split.val is {spec.val:g}, but {store.path} has an official test part, so the "
            "fold validates. Leave data.split.val out."
        )
    if official:
        train = [unit for i, one in enumerate(folds) if i != fold for unit in one]
        return [train, folds[fold], [], []], method
    if spec.val is not None:
        rest = [unit for i, one in enumerate(folds) if i != fold for unit in one]
        size = min(max(round(spec.val * len(rest)), 1), len(rest) - 1)
        if size < 1 or spec.val == 0:
            raise _too_few(store, len(units), 3, official)
        return [rest[size:], rest[:size], folds[fold], []], f"{method}, val {spec.val:g}"
    if count < 3:
        raise MedsegError(
            "split.folds is 2: one fold tests, the next validates, none is left to train on. "
            "Take 3 folds or more, or set data.split.val to a fraction."
        )
    after = (fold + 1) % count
    train = [unit for i, one in enumerate(folds) if i not in (fold, after) for unit in one]
    return [train, folds[after], folds[fold], []], method


def _sizes(
    available: int, spec: SplitSpec, official: bool, store: SliceStore
) -> tuple[tuple[int, int, int], str]:
    """Return how many units go to train, val and test, and how that was said."""
    if spec.kind == "counts":
        wanted = (int(spec.train or 0), int(spec.val or 0), int(spec.test or 0))
        if sum(wanted) > available:
            raise MedsegError(
                f"{store.path}: the split asks for {sum(wanted)} patients or videos "
                f"({'/'.join(map(str, wanted))}), there are {available} to divide. Lower the "
                "counts."
            )
        return wanted, f"counts {'/'.join(map(str, wanted))}"
    fractions = spec.fractions(official)
    shown = "/".join(f"{value:g}" for value in fractions)
    if abs(sum(fractions) - 1) > 1e-6 or min(fractions) < 0:
        hint = " beside the official test part" if official else ""
        raise MedsegError(
            f"split: the fractions {shown} of train, val, test{hint} do not add up to 1. Leave "
            "data.split.train out to train on the rest."
        )
    needed = sum(value > 0 for value in fractions)
    if available < needed:
        raise _too_few(store, available, needed, official)
    return apportion(available, fractions), f"fractions {shown}"


def _draw_slices(
    store: SliceStore, cases: Sequence[str], wanted: int, seed: int
) -> dict[str, tuple[int, ...]]:
    """Draw training slices, all with the same chance."""
    pool = [(case, number) for case in sorted(cases) for number in range(store.row(case).slices)]
    if wanted > len(pool):
        raise MedsegError(
            f"data.split.train_frames is {wanted}, the training part has {len(pool)} slices. Lower "
            "it, or leave it out to use all."
        )
    # A stream of its own, so that the subset does not depend on how the cases were divided.
    order = np.random.Generator(np.random.PCG64([seed, 1])).permutation(len(pool))[:wanted]
    slices: dict[str, list[int]] = {case: [] for case in sorted(cases)}
    for index in np.sort(order):
        slices[pool[index][0]].append(pool[index][1])
    return {case: tuple(numbers) for case, numbers in slices.items()}


def _official_test(store: SliceStore) -> set[str]:
    return {row.name for row in store.manifest.cases if row.part == "test"}


def _cases(units: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(sorted(case for unit in units for case in unit))


def _too_few(store: SliceStore, available: int, needed: int, official: bool) -> MedsegError:
    beside = " beside the official test part" if official else ""
    return MedsegError(
        f"{store.path}: has {available} patients or videos to divide{beside}, and a split by "
        f"patient needs {needed} at least. Slices of one patient cannot be divided: convert more."
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:6])
    return shown + (f" ... ({len(names)} in all)" if len(names) > 6 else "")
