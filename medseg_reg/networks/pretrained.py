"""Weights from a local file into a network, for the whole of it or for its encoder.

Nothing is downloaded and no code of the file is run. The file holds tensors by name: safetensors,
or a checkpoint with them alone or below a key such as `state_dict`, whose names may have a prefix
such as `module.`. Regularizers have no weights: they may be in the network already or come later.
Channels of a coarse network beside those of the image begin with the weight 0, where the file knows
images alone.
What stands beside the blocks of a transformer, heads of token labels and predictors of token
selection, may be missing in the file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from medseg_reg.errors import MedsegError
from medseg_reg.networks.position_tables import fitting_table
from medseg_reg.networks.reuse import coarse_of
from medseg_reg.networks.token_labels import TokenLabels
from medseg_reg.networks.token_selection import TokenSelection

Part = Literal["network", "encoder"]

_CONTAINERS = ("state_dict", "model_state_dict", "model", "network", "net")
_PREFIXES = (
    "",
    "module.",
    "network.",
    "network.network.",
    "model.",
    "net.",
    "encoder.",
    "backbone.",
    "network.encoder.model.",  # a pre-training of the ViT in DPT, for a classifier
)
# Beginnings of the names of an encoder: of `smp`, of our networks, and the transformer of UNETR.
_ENCODERS = (
    ("network.encoder.",),
    ("encoder.", "bottleneck."),
    ("network.vit.",),
    ("vit.",),
)
# A network is the same without them, but for their names.
_BESIDE = (TokenLabels, TokenSelection)
# Statistics that older files lack, and that nothing is computed from.
_OPTIONAL = "num_batches_tracked"


@dataclass(frozen=True)
class PretrainedReport:
    """What of a file went where.

    Attributes:
        file: the file.
        part: what was loaded.
        taken: names of tensors of the network that were loaded.
        adapted: of these, the first convolution, if it was made for other image channels.
        resized: of these, positions of a transformer that were made for another size of the image.
        left_out: names of tensors of the file that have no place.
        new: names of tensors of the part that keep their new weights.
    """

    file: str
    part: Part
    taken: tuple[str, ...]
    adapted: tuple[str, ...]
    left_out: tuple[str, ...]
    new: tuple[str, ...]
    resized: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say it in one line."""
        text = f"{self.file}: {len(self.taken)} tensors of the {self.part} taken"
        for names, what in (
            (self.adapted, "adapted to the image channels"),
            (self.resized, "interpolated to the image size"),
            (self.left_out, "left out"),
            (self.new, "not in the file"),
        ):
            text += f"; {len(names)} {what} ({_some(names)})" if names else ""
        return text

    def as_dict(self) -> dict[str, Any]:
        """Return plain types, for JSON."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


def load_pretrained(
    network: nn.Module, path: Path, *, strict: bool = True, part: Part | None = None
) -> PretrainedReport:
    """Load the weights of a file into a network, or into its encoder.

    Args:
        network: with or without regularizers.
        path: safetensors, or a checkpoint that `torch.load(weights_only=True)` reads.
        strict: whether every tensor of the file must have a place, and every tensor of the part
            must be in the file, but for what stands beside its blocks. Otherwise what fits is
            loaded and the report says what does not.
        part: what the file is for; by default what it matches better.

    Raises:
        MedsegError: the file cannot be read, or does not fit. The network is unchanged then.
    """
    found, target = read_tensors(path), network.state_dict()
    matches = [match for match in _matches(network, found) if part in (None, match.part)]
    best = max(matches, key=lambda match: (match.exact, len(match.pairs)), default=None)
    if best is None or not best.pairs:
        raise MedsegError(
            f"{path}: no tensor fits {'the encoder of ' if part == 'encoder' else ''}this network. "
            f"The file has, for example, {_some(tuple(found))}; the network {_some(tuple(target))}."
        )
    if strict and not best.exact:
        raise MedsegError(
            f"{path}: does not fit the {best.part}: {_misfit(best, found, target)}. Set "
            "network.pretrained_strict=false to load what fits."
        )
    coarse = coarse_of(network)
    further = 0 if coarse is None else coarse.channels
    weights = {
        mine: _adapted(found[theirs], target[mine].shape[1], further)
        if mine in best.adapted
        else best.resized.get(mine, found[theirs])
        for mine, theirs in best.pairs.items()
    }
    network.load_state_dict(weights, strict=False)
    return PretrainedReport(
        str(path),
        best.part,
        tuple(best.pairs),
        best.adapted,
        best.left_out,
        best.new + best.beside,
        tuple(best.resized),
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the named tensors of a file.

    Raises:
        MedsegError: it is missing, damaged, holds code, or no tensors.
    """
    if not path.is_file():
        raise MedsegError(
            f"{path}: does not exist. Pretrained weights come from a local file alone."
        )
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise MedsegError(f"{path}: cannot be read ({_line(error)}).") from None
    except Exception as error:
        # torch raises many types, for a damaged file as for one that holds code.
        raise MedsegError(
            f"{path}: cannot be read as tensors alone ({type(error).__name__}: {_line(error)})."
        ) from None
    for key in _CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        raise MedsegError(f"{path}: holds no tensors by name.")
    return tensors


@dataclass(frozen=True)
class _Match:
    """One way to read the names of a file, with what it would take and leave."""

    part: Part
    pairs: dict[str, str]
    adapted: tuple[str, ...]
    left_out: tuple[str, ...]
    new: tuple[str, ...]
    beside: tuple[str, ...]
    resized: dict[str, Tensor]

    @property
    def exact(self) -> bool:
        """Whether file and part have the same tensors, but for what a file need not have."""
        return not self.left_out and not self.new


def _matches(network: nn.Module, found: Mapping[str, Tensor]) -> Iterator[_Match]:
    """Yield every way to read the names of a file."""
    target = network.state_dict()
    first = next((name for name, value in target.items() if value.ndim >= 4), "")
    modules = network.named_modules()
    aside = tuple(f"{name}." for name, one in modules if isinstance(one, _BESIDE))
    widened = coarse_of(network) is not None
    for part, beginnings in _parts(target).items():
        wanted = [name for name in target if name.startswith(beginnings)]
        for own in _own_prefixes(beginnings):
            mine = {_plain(name.removeprefix(own)): name for name in wanted if name.startswith(own)}
            for other in _PREFIXES:
                pairs, adapted, resized = {}, [], {}
                for name, value in found.items():
                    place = mine.get(_plain(name.removeprefix(other)))
                    if place is None or not name.startswith(other) or place in pairs:
                        continue
                    # An encoder of three channels, as that of colors, was made for no answer of a
                    # coarse network, though image and answer may have as many.
                    of_images = widened and place == first and part == "encoder"
                    if value.shape == target[place].shape and not of_images:
                        pairs[place] = name
                    elif place == first and _fits_but_channels(value, target[place]):
                        pairs[place] = name
                        adapted.append(place)
                    elif (table := fitting_table(network, place, value)) is not None:
                        pairs[place], resized[place] = name, table
                used = set(pairs.values())
                new = [n for n in wanted if n not in pairs and not n.endswith(_OPTIONAL)]
                yield _Match(
                    part,
                    pairs,
                    tuple(adapted),
                    tuple(n for n in found if n not in used and not n.endswith(_OPTIONAL)),
                    tuple(n for n in new if not n.startswith(aside)),
                    tuple(n for n in new if n.startswith(aside)),
                    resized,
                )


def _parts(names: Collection[str]) -> dict[Part, tuple[str, ...]]:
    """Return the beginnings of the names of each part; the encoder ends with the bottleneck."""
    parts: dict[Part, tuple[str, ...]] = {"network": ("",)}
    for encoder in _ENCODERS:
        if any(name.startswith(encoder) for name in names):
            parts["encoder"] = encoder
            break
    return parts


def _own_prefixes(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Return what files leave out of the names of a part."""
    if parts == ("",):
        return ("", "network.")
    # segmentation-models-pytorch has timm's encoders one level deeper.
    return ("", parts[0], f"{parts[0]}model.") if len(parts) == 1 else ("",)


def _plain(name: str) -> str:
    # timm's encoders have stages_0 where its classifiers have stages.0.
    return name.replace(".", "_")


def _fits_but_channels(value: Tensor, mine: Tensor) -> bool:
    return value.ndim == mine.ndim and (
        (value.shape[0], *value.shape[2:]) == (mine.shape[0], *mine.shape[2:])
    )


def _adapted(weight: Tensor, channels: int, further: int = 0) -> Tensor:
    """Return the weight of a first convolution for another number of image channels.

    One channel gets the sum, as if all channels showed the same. More take their weights in turn,
    scaled so that the sum over the channels stays about the same. The `further` ones at the end,
    of a coarse network, get 0.
    """
    before, channels = weight.shape[1], channels - further
    if channels == 1:
        found = weight.sum(dim=1, keepdim=True)
    else:
        found = weight[:, torch.arange(channels) % before] * (before / channels)
    return functional.pad(found, (0, 0) * (weight.ndim - 2) + (0, further))


def _misfit(match: _Match, found: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> str:
    """Say what does not fit; a tensor of another shape first."""
    names = {_plain(name): name for name in match.left_out}
    for name in match.new:
        theirs = next((n for plain, n in names.items() if _plain(name).endswith(plain)), None)
        if theirs is not None and found[theirs].shape != target[name].shape:
            shapes = [tuple(found[theirs].shape), tuple(target[name].shape)]
            return f"'{theirs}' has the shape {shapes[0]}, the network's '{name}' {shapes[1]}"
    parts = [f"{len(match.pairs)} tensors fit"]
    if match.left_out:
        parts.append(f"{len(match.left_out)} have no place ({_some(match.left_out)})")
    if match.new:
        parts.append(f"{len(match.new)} are not in the file ({_some(match.new)})")
    return ", ".join(parts)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
