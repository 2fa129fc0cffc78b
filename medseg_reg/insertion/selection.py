"""Which places a pattern names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from medseg_reg.errors import MedsegError, nearest


def choose(known: Sequence[str], patterns: Sequence[str], owner: str) -> list[str]:
    """Return the names that patterns name, once each.

    A pattern is the name of a place (`encoder.2.between_convs`), its last part
    (`between_convs`, all of them), a shell pattern (`encoder.*.after_block`), or the name of a
    part of the network: of a block (`encoder.2`, `bottleneck`), which is its `after_block`, or of
    several (`encoder`: the `after_block` of each; `skip`: every skip connection). A number alone
    names nothing. Where several places share a name they are numbered (`encoder.2.after_norm.0`)
    and the name without number means all of them.

    Raises:
        MedsegError: there are no patterns, or one matches nothing; lists what there is.
    """
    if not patterns:
        raise MedsegError(f"{owner}: no places are given. Name at least one.")
    chosen: dict[str, None] = {}
    for pattern in patterns:
        found = named(known, pattern)
        if not found:
            parts = {place.rsplit(".", n)[0] for place in known for n in (1, 2)}
            short = sorted({kind_of(place) for place in known})
            hint = nearest(pattern, [*short, *sorted(parts), *known])
            raise MedsegError(f"{owner}: no place matches '{pattern}'.{hint} {overview(known)}")
        chosen.update(dict.fromkeys(found))
    return list(chosen)


def named(known: Iterable[str], pattern: str) -> list[str]:
    """Return the places that one pattern names; see `choose`."""
    known = list(known)
    found = [
        place
        for place in known
        if kind_of(place) == pattern
        or fnmatchcase(place, pattern)
        or fnmatchcase(_without_number(place), pattern)
    ]
    if found:
        return found
    inside = [place for place in known if place.startswith(f"{pattern}.")]
    # "At a block" is read as on its output; a part that has no blocks is taken whole.
    return [place for place in inside if kind_of(place) == "after_block"] or inside


def kind_of(place: str) -> str:
    """Return the last part of a name that is no number."""
    parts = place.split(".")
    while len(parts) > 1 and parts[-1].isdigit():
        parts.pop()
    return parts[-1]


def overview(known: Sequence[str]) -> str:
    """Return kinds, with their number where there are several, and a few full names."""
    if not known:
        return "The network has no places at all."
    count = Counter(map(kind_of, known))
    kinds = ", ".join(f"{kind} ({n})" if n > 1 else kind for kind, n in sorted(count.items()))
    if set(count) == {"input"}:
        return (
            f"Places: {kinds} alone. Nothing else was recognized: a network of tokens, for "
            "example, has no maps (B, C, *spatial) between its layers."
        )
    return f"Places: {kinds}; in full, for example, {', '.join(known[:4])}."


def _without_number(place: str) -> str:
    """Return a name without the number that tells it from others; in `skip.0` it is the level."""
    rest, _, last = place.rpartition(".")
    return rest if last.isdigit() and rest and rest.split(".")[-1] != "skip" else place
