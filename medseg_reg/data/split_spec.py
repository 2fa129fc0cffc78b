"""How to divide a store into train, validation and test: the part of a configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PARTS = ("train", "val", "test")
DEFAULT_FRACTION = 0.15
DEFAULT_FOLDS = 5

_KEYS_OF_KIND = {
    "fractions": {"train", "val", "test"},
    "counts": {"train", "val", "test"},
    "kfold": {"folds", "fold", "val"},
    "file": {"file"},
}


class SplitSpec(BaseModel):
    """How to divide a store, as written in a configuration.

    Attributes:
        kind: `fractions` of the groups, `counts` of groups (the rest stays unused), `kfold`
            cross-validation, or a `file` with the names of the cases.
        train: fraction or number of groups; as a fraction, by default what the others leave.
        val: fraction or number of groups; as a fraction, by default 0.15 or what the others
            leave. With `kfold`, the fraction of the groups outside the test fold that
            validates; by default the fold after the test fold validates.
        test: like `val`. Left out when the data set has an official test part, which is then
            the test part.
        folds: number of folds, by default 5.
        fold: the fold that is tested, from 0; validated instead when there is an official test
            part.
        file: a JSON file with the lists `train`, `val`, `test` and, if wanted, `unused`.
        train_frames: train on so many slices, drawn at random from the training part.
        seed: decides the draw; independent of the seed of the training, so that repeated runs
            share one split.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["fractions", "counts", "kfold", "file"] = "fractions"
    train: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    val: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    test: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    folds: int | None = Field(default=None, ge=2)
    fold: int | None = Field(default=None, ge=0)
    file: str | None = None
    train_frames: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> SplitSpec:
        for key in ("train", "val", "test", "folds", "fold", "file"):
            if getattr(self, key) is not None and key not in _KEYS_OF_KIND[self.kind]:
                raise ValueError(f"'{key}' has no meaning for kind '{self.kind}'; leave it out")
        given = {part: getattr(self, part) for part in PARTS if getattr(self, part) is not None}
        if self.kind == "counts":
            self._check_counts(given)
        elif (self.kind == "fractions" and sum(given.values()) > 1 + 1e-6) or any(
            value >= 1 for value in given.values()
        ):
            shown = ", ".join(f"{part} {value:g}" for part, value in given.items())
            raise ValueError(f"{shown}: fractions lie below 1 and add up to 1 at most")
        if self.kind == "kfold" and (self.fold or 0) >= (self.folds or DEFAULT_FOLDS):
            last = (self.folds or DEFAULT_FOLDS) - 1
            raise ValueError(f"fold {self.fold} does not exist; folds are numbered 0 to {last}")
        if self.kind == "file" and self.file is None:
            raise ValueError("kind 'file' needs 'file', the path of a JSON file")
        return self

    def _check_counts(self, given: dict[str, float]) -> None:
        for part in ("train", "val"):
            if part not in given:
                raise ValueError(f"kind 'counts' needs '{part}', a number of patients or videos")
        for part, value in given.items():
            if value != int(value):
                raise ValueError(f"{part} {value:g} is no whole number of patients or videos")

    def fractions(self, official: bool) -> tuple[float, float, float]:
        """Return all fractions, those left open filled in, given an official test part or not."""
        train, val, test = self.train, self.val, 0.0 if official else self.test
        if test is None:
            test = DEFAULT_FRACTION if None in (train, val) else 1 - (train or 0) - (val or 0)
        if val is None:
            val = DEFAULT_FRACTION if train is None else 1 - train - test
        if train is None:
            train = 1 - val - test
        # Rounded, because 1 - 0.8 - 0.2 is not 0 in binary.
        return round(train, 9), round(val, 9), round(test, 9)


def apportion(total: int, fractions: tuple[float, float, float]) -> tuple[int, int, int]:
    """Round fractions of `total` to whole numbers that add up; no nonzero fraction gets none."""
    exact = [value * total for value in fractions]
    sizes = [int(value + 1e-9) for value in exact]
    by_remainder = sorted(range(3), key=lambda i: (sizes[i] - exact[i], i))
    for index in by_remainder[: total - sum(sizes)]:
        sizes[index] += 1
    for index in range(3):
        if fractions[index] > 0 and sizes[index] == 0:
            sizes[sizes.index(max(sizes))] -= 1
            sizes[index] = 1
    return sizes[0], sizes[1], sizes[2]
