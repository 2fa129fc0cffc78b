"""The run directory: everything about one training run, enough to predict from by itself.

config.yaml           the configuration, every default written out
environment.json      versions, processor, precision, memory format, times
data.json             classes, channels and origin of the data
splits.json           which cases were trained on, validated on, tested on
seen.json             those trained and validated on, by hashes of what they hold
placement.json        every regularizer: place, class, rate asked for and rate measured
pretrained.json       what of a file of pretrained weights was taken, and where that comes from;
                      only where there was one
teacher.json          the run that this one learned from, the hash of its weights, and what it
                      knows of the cases; if any
coarse.json           the run whose answer this one takes in, likewise
coarse/               what is needed of that run
metrics.csv           one row an epoch; scheduled rates by their keys
checkpoints/          last and previous state, for an exact resume
weights.safetensors   the trained network; its presence says that training is done
memory.safetensors    what layers remember of the training, where they do
evaluation/           per_case.csv, per_slice.csv
summary.json, panels.png, curves.png
tensorboard/
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from medseg_reg.config import Config, RunConfig, SomeConfig, kind_of, load_config
from medseg_reg.config_file import read_yaml
from medseg_reg.data.splits import Splits, read_splits
from medseg_reg.data.store import SliceStore
from medseg_reg.errors import MedsegError
from medseg_reg.files import read_json, require_writable, sha256_of, write_json, write_text
from medseg_reg.networks.pretrained import PretrainedReport

PACKAGES = (
    "medseg-reg",
    "torch",
    "lightning",
    "monai",
    "segmentation-models-pytorch",
    "timm",
    "numpy",
    "numba",
    "albumentations",
    "opencv-python-headless",
    "pydicom",
    "nibabel",
    "SimpleITK",
    "scipy",
)


_HINTS = (
    " The weights of a pre-training are for network.pretrained of a training; a classifier is run "
    "by medseg_reg.classify."
)


class DataFacts(BaseModel):
    """What a trained network must know of its data to be used without them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    classes: tuple[str, ...]
    channels: int
    unit: str
    modality: str
    citation: str
    licence: str
    manifest_sha256: str
    conversion: dict[str, Any]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, store: SliceStore, channels: int) -> DataFacts:
        """Gather the facts from a store."""
        about = store.manifest.description
        return cls(
            name=about.name,
            classes=about.classes,
            channels=channels,
            unit=about.unit,
            modality=about.modality,
            citation=about.citation,
            licence=about.licence,
            manifest_sha256=manifest_hash(store),
            conversion=store.manifest.settings,
            notes=about.notes,
        )


def manifest_hash(store: SliceStore) -> str:
    """Return a hash of everything a store holds (its manifest has the hashes of the arrays)."""
    return hashlib.sha256((store.path / "manifest.json").read_bytes()).hexdigest()


class RunDirectory:
    """A run directory; the constructor only holds the path.

    Args:
        path: the directory.
    """

    # Of which command it is a run, see `kind_of`.
    kind, command = "training", "train"

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def weights(self) -> Path:
        """The trained weights."""
        return self.path / "weights.safetensors"

    @property
    def memory(self) -> Path:
        """What the layers remember of the training; there is none where they remember nothing."""
        return self.path / "memory.safetensors"

    @property
    def coarse(self) -> RunDirectory:
        """The coarse run whose answer this one takes in, as far as it is needed to predict."""
        return RunDirectory(self.path / "coarse")

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether training is done."""
        return self.weights.exists()

    @property
    def begun(self) -> bool:
        """Whether it has a checkpoint to go on from."""
        return any(self.checkpoints.glob("*.ckpt"))

    def require_finished(self) -> None:
        """Refuse a run whose training is not done."""
        if not self.finished:
            raise MedsegError(
                f"{self.path}: the training is not finished (no weights.safetensors). Run "
                f"`python -m medseg_reg.{self.command}` with its configuration again; it goes on."
            )

    def is_done(self, config: RunConfig, store: SliceStore) -> bool:
        """Whether nothing is left to train.

        Raises:
            MedsegError: it is finished, but with other settings or other data.
        """
        if self.finished:
            self.prepare(config)
            self.require_data(store)
        return self.finished

    def goes_on_with(self, config: SomeConfig) -> SomeConfig:
        """Return the configuration in which `auto` is what the run, where it has begun, has.

        A run from before `training.memory_format` has the order of its maps written out. The
        same command of today says `auto`, and in another order the run would round differently.
        """
        existing = self.path / "config.yaml"
        if config.training.memory_format != "auto" or not existing.exists():
            return config
        kept = {"memory_format": self._read().training.memory_format}
        training = config.training.model_copy(update=kept)
        return config.model_copy(update={"training": training})

    def prepare(self, config: RunConfig) -> None:
        """Make the directory, or go on with one that an interrupted run left.

        Raises:
            MedsegError: the directory cannot be written to, holds a run with other settings, or
                holds other files.
        """
        existing = self.path / "config.yaml"
        if existing.exists():
            self._require_same(config)
        else:
            # A run that was killed just here has left half a configuration, which is hidden.
            if self.path.exists() and not all(p.name[0] == "." for p in self.path.iterdir()):
                raise MedsegError(
                    f"{self.path}: exists and is not a run directory. Choose another with "
                    "`run=DIR`; nothing was touched."
                )
            require_writable(self.path)
            write_text(existing, config.to_yaml())
        self.checkpoints.mkdir(exist_ok=True)

    def _require_same(self, config: RunConfig) -> None:
        # Read by the models, so that keys which came after the run have their defaults.
        found = _flat(yaml.safe_load(self._read().to_yaml()))
        wanted = _flat(yaml.safe_load(config.to_yaml()))
        # What changes neither weights nor scores may differ between a run and its resume.
        free = {
            "data.workers",
            "training.progress",
            "training.checkpoint_minutes",
            "training.keep_memory",
            "run",
        }
        keys = [
            key
            for key in sorted(found.keys() | wanted.keys())
            if key not in free and found.get(key) != wanted.get(key)
        ]
        if keys:
            shown = "; ".join(f"{k}: {found.get(k)}, now {wanted.get(k)}" for k in keys[:4])
            raise MedsegError(
                f"{self.path}: holds a run with other settings ({shown}). Choose another "
                "directory with `run=DIR`, or delete this one."
            )

    def begin(self, facts: DataFacts, store: SliceStore) -> None:
        """Note the data of the run, or make sure that they are still the same."""
        if (self.path / "data.json").exists():
            self.require_data(store)
        else:
            write_json(self.path / "data.json", facts.model_dump(mode="json"))

    def config(self) -> Config:
        """Read the configuration of the run."""
        if not (self.path / "config.yaml").exists():
            raise MedsegError(
                f"{self.path}: is not a run directory (no config.yaml). "
                "`python -m medseg_reg.train --config FILE` makes one."
            )
        found: Config = self._read()
        return found

    def data_facts(self) -> DataFacts:
        """Read what the run knows of its data."""
        path = self.path / "data.json"
        try:
            return DataFacts.model_validate(read_json(path))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise MedsegError(f"{path}: is damaged: '{key}': {first['msg']}.") from None

    def splits(self, store: SliceStore) -> Splits | None:
        """Read the split of the run, if it has been made."""
        path = self.path / "splits.json"
        return read_splits(path, store) if path.exists() else None

    def data(self, store_path: Path) -> tuple[SliceStore, Splits]:
        """Open the store of the run, and read which of its cases are for what.

        Raises:
            MedsegError: the store is missing or has changed, or there is no split yet.
        """
        store = SliceStore(store_path)
        self.require_data(store)
        splits = self.splits(store)
        if splits is None:
            raise MedsegError(f"{self.path / 'splits.json'}: is missing; the run is incomplete.")
        return store, splits

    def require_data(self, store: SliceStore) -> None:
        """Refuse a store that is not the one that the run was trained on."""
        if self.data_facts().manifest_sha256 != manifest_hash(store):
            raise MedsegError(
                f"{store.path}: has changed since {self.path} was trained on it, so its scores "
                "would not be this run's. Restore it, or train again into another directory."
            )

    def _read(self) -> Any:
        """Read the configuration of the run.

        Raises:
            MedsegError: it is damaged, or that of another command.
        """
        path = self.path / "config.yaml"
        content, _ = read_yaml(path)
        if (other := kind_of(content)) != self.kind:
            shown = "training with labels" if other == "training" else other
            raise MedsegError(f"{self.path}: is a run of {shown}, no run of {self.kind}.{_HINTS}")
        return self._load(path)

    def _load(self, path: Path) -> RunConfig:
        return load_config(path)

    def note_pretrained(
        self, report: PretrainedReport | None, origin: dict[str, Any] | None
    ) -> None:
        """Print what was taken of pretrained weights, if any were loaded, and keep it.

        Args:
            report: what was taken.
            origin: what is known of the training that they come from.
        """
        if report is not None:
            print(f"pretrained: {report}")
            more = {"sha256": sha256_of(Path(report.file)), "origin": origin}
            write_json(self.path / "pretrained.json", {**report.as_dict(), **more})

    def learned_from(self) -> list[dict[str, Any]]:
        """Read what the run has learned elsewhere: of other runs and its pretrained weights."""
        names = ("teacher.json", "coarse.json", "pretrained.json")
        notes = [self.path / name for name in names]
        found = [read_json(note).get("origin") for note in notes if note.exists()]
        return [origin for origin in found if origin]

    def write_environment(self, **more: Any) -> None:
        """Note what the run ran on, and what it began with."""
        learned = {"learned_from": self.learned_from()}
        write_json(self.path / "environment.json", {**environment(), **learned, **more})

    def chosen(self) -> dict[str, Any]:
        """Read what the training chose where its configuration says `auto`."""
        path = self.path / "environment.json"
        noted = read_json(path) if path.exists() else {}
        return {key: noted[key] for key in ("precision", "memory_format") if key in noted}


def environment() -> dict[str, Any]:
    """Return versions, processor and accelerator, as plain types."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "packages": versions,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(content, dict) and content:
        items = content.items()
    elif isinstance(content, list) and any(isinstance(item, dict) for item in content):
        items = dict(enumerate(content)).items()
    else:
        return {prefix: content}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat.update(_flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat
