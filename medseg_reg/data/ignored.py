"""Pixels whose class is not known: what configuration and store must agree on."""

from __future__ import annotations

from medseg_reg.data.store import SliceStore
from medseg_reg.errors import MedsegError


def require_ignored(store: SliceStore, label: int | None) -> None:
    """Refuse a `data.ignore_label` that is not the one with which the store was converted.

    Args:
        store: the slice store, which may hold a label besides its classes.
        label: the value of `data.ignore_label`.

    Raises:
        MedsegError: names both values and what to do.
    """
    stored = store.ignore_label
    if label == stored:
        return
    if label is None:
        raise MedsegError(
            f"{store.path}: pixels with the label {stored} have no known class. Set "
            f"data.ignore_label={stored}, so that losses and scores leave them out."
        )
    where = f"data.ignore_label is {label}, but"
    if label < len(store.classes):
        raise MedsegError(
            f"{where} in {store.path} that is the class '{store.classes[label]}' (classes are 0 to "
            f"{len(store.classes) - 1}). To ignore it, leave it out of the classes and convert the "
            f"data again with --ignore-label {label}."
        )
    if stored is None:
        raise MedsegError(
            f"{where} {store.path} was converted without ignored pixels. Leave the key out, or "
            f"convert the data again with --ignore-label {label}."
        )
    raise MedsegError(
        f"{where} {store.path} was converted with --ignore-label {stored}. Set "
        f"data.ignore_label={stored}."
    )
