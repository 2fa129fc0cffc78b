"""What the layers of a network remember between steps: no weights, but a run needs it.

It is kept out of the network's state_dict, so weights load with and without regularizers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from medseg_reg.errors import MedsegError
from medseg_reg.files import write_bytes
from medseg_reg.regularizers import Regularizer

Memory = dict[str, dict[str, Tensor]]


def layers_of(network: nn.Module) -> dict[str, Regularizer]:
    """Return the regularizers of a network by their paths."""
    return {n: m for n, m in network.named_modules() if isinstance(m, Regularizer)}


def memory_of(network: nn.Module) -> Memory:
    """Return what each layer remembers, on the CPU; layers that remember nothing are left out."""
    memories = {path: layer.memory() for path, layer in layers_of(network).items()}
    return {
        path: {name: value.detach().cpu().contiguous() for name, value in memory.items()}
        for path, memory in memories.items()
        if memory
    }


def restore_memory(
    network: nn.Module, memory: Mapping[str, Mapping[str, Tensor]], origin: str
) -> None:
    """Give the layers back what `memory_of` returned; `origin` names its file in errors."""
    layers = layers_of(network)
    device = next(network.parameters()).device
    for path, values in memory.items():
        if path not in layers:
            raise MedsegError(f"{origin}: holds the memory of '{path}', where no layer is.")
        try:
            layers[path].load_memory({name: value.to(device) for name, value in values.items()})
        except (ValueError, KeyError, RuntimeError) as error:
            raise MedsegError(f"{origin}: the memory of '{path}' does not fit: {error}.") from None


def save_memory(network: nn.Module, path: Path) -> None:
    """Write what the layers remember as safetensors; no file where they remember nothing."""
    memory = memory_of(network)
    flat = {f"{p}:{name}": v for p, values in memory.items() for name, v in values.items()}
    if flat:
        write_bytes(path, save(flat))
    else:
        path.unlink(missing_ok=True)


def load_memory(network: nn.Module, path: Path) -> None:
    """Read what `save_memory` wrote, if it wrote a file."""
    if not path.exists():
        return
    try:
        flat = load_file(path)
    except (SafetensorError, OSError) as error:
        raise MedsegError(
            f"{path}: cannot be read ({' '.join(str(error).split())[:160]})."
        ) from None
    memory: Memory = {}
    for key, value in flat.items():
        where, _, name = key.rpartition(":")
        memory.setdefault(where, {})[name] = value
    restore_memory(network, memory, str(path))
