"""Keys of a study that would do nothing, because the study sets them again for each run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medseg_reg.study.spec import StudySpec

# What stays of a data set's split where folds take its place.
KEPT_OF_SPLIT = ("seed", "train_frames")
_ARCHITECTURE = "regularization.architecture"


def leaves(overrides: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by their dotted keys; lists are values.

    >>> leaves({"network": {"name": "unet"}, "training.epochs": 3})
    {'network.name': 'unet', 'training.epochs': 3}
    """
    found: dict[str, Any] = {}
    for key, value in overrides.items():
        inner = isinstance(value, Mapping) and value
        found |= leaves(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def require_no_idle_keys(study: StudySpec) -> None:
    """Refuse overrides that something else in the study replaces.

    Raises:
        ValueError: names where the key stands, the key, and what to do.
    """
    groups = {f"datasets.{name}.overrides": one.overrides for name, one in study.datasets.items()}
    for place, overrides in {"overrides": study.overrides, **groups}.items():
        # Overrides in the place of a file hold its split, which folds and splits replace as any
        # file's.
        name = place.split(".", 1)[1].removesuffix(".overrides") if "." in place else ""
        is_file = bool(name) and study.datasets[name].config is None
        given = leaves(overrides)
        idle = [
            *_layers(given),
            *_budget(study, given),
            *(_networks(study, given) if not name else ()),
            *(_split(study, given) if not is_file else ()),
        ]
        if idle:
            key, why = idle[0]
            raise ValueError(f"{place}: '{key}' would do nothing: {why}")


def require_no_idle_grids(content: Any) -> None:
    """Refuse grids over the rate beside `equal_rates`.

    Args:
        content: of the file of a study, as it is written.

    Raises:
        ValueError: names the grid, and what to do.
    """
    methods = content.get("methods") if isinstance(content, Mapping) else None
    if not isinstance(methods, Mapping) or content.get("equal_rates") is None:
        return
    for name, method in methods.items():
        grid = method.get("grid") if isinstance(method, Mapping) else None
        if isinstance(grid, Mapping) and "p" in grid:
            raise ValueError(
                f"methods.{name}.grid.p would do nothing beside equal_rates, which sets p; "
                "leave one of them out"
            )


def is_below(key: str, group: str) -> bool:
    """Whether a key is a group or lies in it.

    >>> is_below("data.split.seed", "data.split"), is_below("database", "data")
    (True, False)
    """
    return key == group or key.startswith(f"{group}.")


def _layers(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in given:
        if is_below(key, _ARCHITECTURE):
            yield key, "the layers are those of each method. Write them in 'methods'"


def _budget(study: StudySpec, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    pairs = {"training.epochs": "epochs", "data.batch_size": "batch_size"}
    for key, name in pairs.items():
        if key in given and getattr(study.budget, name) is not None:
            yield key, f"'budget.{name}' sets it for all runs. Keep one of the two"


def _networks(study: StudySpec, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, network in study.networks.items():
        for key in given:
            if any(is_below(key, f"network.{one}") for one in leaves(network)):
                last = key.removeprefix("network.")
                yield (
                    key,
                    f"'networks.{name}.{last}' sets it. Change it there, and leave it out here",
                )


def _split(study: StudySpec, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in given:
        if not is_below(key, "data.split"):
            continue
        last = key.removeprefix("data.split").removeprefix(".")
        if study.folds is not None and last not in KEPT_OF_SPLIT:
            kept = " and ".join(f"data.split.{one}" for one in KEPT_OF_SPLIT)
            yield (
                key,
                f"'folds' replaces the split, all but {kept}. Leave it out, or leave out folds",
            )
        if study.splits and last == "seed":
            yield key, "'splits' has the seeds of the split. Leave it out, or leave out splits"
