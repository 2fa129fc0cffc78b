"""Arguments of foreign networks: known, allowed, and not without effect.

Both packages take arguments that they then ignore: segmentation-models-pytorch passes what it does
not know to the encoder, most of which drop it; MONAI has arguments that count only beside others.
An argument that changes nothing is a mistake that nobody would notice, so it is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from medseg_reg.errors import nearest
from medseg_reg.networks.foreign import (
    ForeignNetwork,
    build_foreign,
    foreign_class,
    later_arguments,
)
from medseg_reg.networks.shapes import run_on_shape

WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")

# What a run decides by itself, and why.
_REFUSED = {
    "spatial_dims": "it is 2, the data are slices",
    "in_channels": "the data decide it",
    "out_channels": "the classes of the data and network.head decide it",
    "classes": "the classes of the data and network.head decide it",
    "activation": "a network returns logits; network.head says what they mean",
    "aux_params": "a second output would not be trained",
}
# What timm's models take beside the arguments of the architecture: sources of weights, and what
# segmentation-models-pytorch decides.
_REFUSED_ENCODER = (
    "cache_dir",
    "checkpoint_path",
    "exportable",
    "feature_cfg",
    "feature_cls",
    "features_only",
    "in_chans",
    "num_classes",
    "out_indices",
    "output_stride",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "scriptable",
)
# They change how much memory a training takes, and nothing that can be seen here.
_INVISIBLE = ("use_checkpoint", "use_flash_attention", "grad_checkpointing")


# What was found right in this process: a run reads its configuration several times.
_passed: set[str] = set()


def check_foreign(name: str, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that a foreign network does not have, that a run decides, or ignored ones.

    Raises:
        ValueError: names the argument and the nearest right one, or what the network says.
    """
    cls = foreign_class(name)
    if (key := repr((name, sorted(arguments.items())))) in _passed:
        return
    signature = inspect.signature(cls.__init__).parameters
    _check_names(name, arguments, signature)
    _check_effect(name, arguments, signature)
    _passed.add(key)


def _check_names(
    name: str, arguments: Mapping[str, Any], signature: Mapping[str, inspect.Parameter]
) -> None:
    """Refuse arguments that are unknown or that a run decides; ask for those that are missing."""
    known = [p for p, one in signature.items() if one.kind is not one.VAR_KEYWORD and p != "self"]
    known = [p for p in known if p not in _REFUSED]
    encoder = ""
    if "encoder_name" in signature:
        encoder = str(arguments.get("encoder_name", signature["encoder_name"].default))
        known += later_arguments(encoder)
    for key, value in arguments.items():
        if key in _REFUSED and key in signature:
            raise ValueError(f"{name}: '{key}' is not given here: {_REFUSED[key]}")
        if key == "encoder_weights":
            check_weights_file(key, value)
        elif key not in known:
            _check_encoder_argument(name, key, known, encoder)
    own = [p for p in known if p in signature]
    required = {p for p in own if signature[p].default is inspect.Parameter.empty}
    if missing := sorted(required - arguments.keys(), key=known.index):
        raise ValueError(f"{name} needs {', '.join(missing)} beside its name")
    if encoder:
        check_encoder(encoder)


def check_weights_file(key: str, value: Any) -> None:
    """Refuse names of weights that would be downloaded."""
    if value is not None and PurePath(str(value)).suffix not in WEIGHT_FILES:
        raise ValueError(
            f"'{key}' is {value!r}: expected null or a local file ({', '.join(WEIGHT_FILES)}). "
            "Nothing is downloaded: fetch the file beforehand, on a machine that may"
        )


def check_encoder(name: str) -> None:
    """Refuse encoders that are not in the installed packages."""
    import segmentation_models_pytorch as smp
    import timm

    own, others = smp.encoders.get_encoder_names(), [f"tu-{one}" for one in timm.list_models()]
    # Behind the point stands the name of pretrained weights, which are not loaded.
    if name not in own and name.split(".")[0] not in others:
        raise ValueError(
            f"no encoder '{name}'.{nearest(name, [*own, *others])} There are {len(own)} of "
            f"segmentation-models-pytorch, as {own[0]}, and {len(others)} of timm, whose names "
            "begin with tu-, as tu-convnext_atto"
        )


def _check_encoder_argument(name: str, key: str, known: Sequence[str], encoder: str) -> None:
    """Let only encoders of timm have arguments of their own."""
    takes = f"It takes {', '.join(known)}"
    if not name.startswith("smp.") or not encoder.startswith("tu-"):
        why = ""
        if encoder:
            own = "".join(f" but {one}" for one in later_arguments(encoder))
            why = f" The encoder {encoder} has no arguments{own}; those of timm (tu-...) do."
        raise ValueError(f"{name} has no argument '{key}'.{nearest(key, known)}{why} {takes}")
    if key == "patch_drop_rate":
        raise ValueError(
            f"{name}: '{key}' leaves out patches in training and puts the others at wrong places "
            "of the map. Use the layer patch_dropout, which puts a token for each that is gone"
        )
    if key in _REFUSED_ENCODER:
        raise ValueError(f"{name}: '{key}' of the encoder is not given here. {takes}")


def _check_effect(
    name: str, arguments: Mapping[str, Any], signature: Mapping[str, inspect.Parameter]
) -> None:
    """Build the network with and without each argument, and refuse those that change nothing."""
    whole = fingerprint(name, arguments)
    for key, value in arguments.items():
        default = signature[key].default if key in signature else inspect.Parameter.empty
        needed = key in signature and default is inspect.Parameter.empty
        if needed or key in (*_INVISIBLE, "encoder_weights") or _same(value, default):
            continue
        rest = {other: value for other, value in arguments.items() if other != key}
        try:
            changed = fingerprint(name, rest) != whole or _begins(name, rest, arguments)
        except ValueError:
            changed = True  # it cannot be left out
        if not changed:
            raise ValueError(
                f"{name}: '{key}' changes nothing beside the other arguments"
                f"{' and this encoder' if key not in signature else ''}. Leave it out, or give "
                "what it needs to count"
            )


def _begins(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two networks of the same weights' shapes begin with other values, as layer scale."""
    first = []
    for arguments in (one, other):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            first.append(build_foreign(name, 1, 2, arguments).state_dict())
    return any(not torch.equal(value, first[1][key]) for key, value in first[0].items())


def fingerprint(name: str, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return all that a network computes in training: its weights' shapes and its operations.

    Raises:
        ValueError: the network cannot be built, or does not run.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return _recorded(build_foreign(name, 1, 2, arguments))
        except ValueError:
            # Some code reads values while it builds or runs; shapes have none.
            return _recorded(build_foreign(name, 1, 2, arguments))


def _recorded(network: ForeignNetwork) -> tuple[Any, ...]:
    size = "x".join(map(str, network.size))
    with _Recorder() as record:
        try:
            logits = run_on_shape(
                network.network, (2, 1, *network.size), training=True, values=True
            )
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            raise ValueError(
                f"{network.name} does not run with images of {size}: {type(error).__name__}: {text}"
            ) from None
    outputs, *found = logits.shape[-3:]
    if (outputs, *found) != (2, *network.size):
        raise ValueError(
            f"{network.name} gives {outputs} maps of {'x'.join(map(str, found))} for images of "
            f"{size}; 2 of {size} are needed for two classes. Leave out what sets the size or "
            "number of its maps, as 'upsampling' or 'use_conv_final'"
        )
    shapes = tuple((key, tuple(value.shape)) for key, value in network.state_dict().items())
    return shapes, tuple(record.operations)


class _Recorder(TorchDispatchMode):
    """Notes every operation, with sizes in place of tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives no types
        self.operations: list[tuple[Any, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.operations.append((str(func), _plain(args), _plain(tuple(kwargs.items()))))
        return func(*args, **kwargs)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return repr(value)


def _same(value: Any, default: Any) -> bool:
    """Whether a value from YAML, where there are only lists, is the default."""
    if isinstance(value, list | tuple) and isinstance(default, list | tuple):
        return len(value) == len(default) and all(map(_same, value, default))
    return type(value) is type(default) and bool(value == default)
