"""In which order the maps of a network lie in memory."""

from __future__ import annotations

import torch
from torch import nn

# Those that compute in the order of channels-last maps; the others copy them to the other order.
FAST_NORMS = (nn.modules.batchnorm._BatchNorm,)
NORMS = (*FAST_NORMS, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)


def choose_memory_format(wanted: str, network: nn.Module, accelerator: str) -> torch.memory_format:
    """Return the memory format of a training; `auto` takes what was measured to be faster.

    With batch normalization, or none, channels_last is faster on a CPU and with tensor cores.
    Instance, group and layer normalization copy a channels-last map to the other order and back,
    which costs more than the convolutions gain. On Apple's GPU it was not measured.

    Args:
        wanted: `auto`, `contiguous` or `channels_last`.
        network: the network with its normalization layers.
        accelerator: `cpu`, `cuda` or `mps`.

    >>> choose_memory_format("auto", nn.BatchNorm2d(4), "cpu")
    torch.channels_last
    >>> choose_memory_format("auto", nn.InstanceNorm2d(4), "cpu")
    torch.contiguous_format
    """
    if wanted == "auto":
        norms = [module for module in network.modules() if isinstance(module, NORMS)]
        fast = accelerator != "mps" and all(isinstance(norm, FAST_NORMS) for norm in norms)
        wanted = "channels_last" if fast else "contiguous"
    return torch.channels_last if wanted == "channels_last" else torch.contiguous_format
