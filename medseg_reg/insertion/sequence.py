"""Hooks that let the blocks of a transformer run on fewer tokens than their readers find."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from medseg_reg.errors import MedsegError
from medseg_reg.insertion.places import Place
from medseg_reg.insertion.tokens import Keys
from medseg_reg.insertion.windows import MaskAgain, hang_windows
from medseg_reg.regularizers import PatchDropout, Regularizer, TokenMerging, weigh_keys


class FewerTokens:
    """A hook that lets a block run on fewer tokens than it gets.

    Attributes:
        layer: what decides on them.
    """

    layer: nn.Module


class AllTokens:
    """A hook that is to see every token behind a block, even where the block gets fewer."""


class KeyWeigher(Protocol):
    """What lets keys of an attention count more or less."""

    def key_weights(self) -> Tensor | None:
        """Return how much each key counts in this pass, (B, keys); None for all alike."""


@dataclass(eq=False)
class GatherHook(FewerTokens):
    """Lets a block run on the tokens that a layer keeps.

    It holds the layer itself, which is beside the module, not inside: copies of a network have
    both.

    Attributes:
        layer: the layer.
    """

    layer: PatchDropout

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Return the arguments, with a part of the tokens."""
        return None if self.layer.kept is None else (self.layer.gathered(args[0]), *args[1:])


@dataclass(eq=False)
class CompleteHook:
    """Puts the mask token for the tokens that a block did not get.

    Attributes:
        layer: the layer.
    """

    layer: PatchDropout

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        """Return all tokens."""
        return None if self.layer.kept is None else self.layer.completed(output)


@dataclass(eq=False)
class MergeHook(FewerTokens):
    """Lets a block run on groups of tokens.

    Attributes:
        layer: which merges them.
    """

    layer: TokenMerging

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Return the arguments, with groups in place of the tokens."""
        merged = self.layer.enter(args[0])
        return None if merged is args[0] else (merged, *args[1:])


@dataclass(eq=False)
class UnmergeHook:
    """Gives each token what a block made of its group.

    Attributes:
        layer: which merged them.
    """

    layer: TokenMerging

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        """Return all tokens."""
        return None if self.layer.groups is None else self.layer.leave(output)


@dataclass(eq=False)
class KeysHook:
    """Lets the keys of an attention count more or less.

    Attributes:
        layer: what says how much.
        argument: of the module, where the weights are one, or a mask of them.
    """

    layer: KeyWeigher
    argument: int | str | None = None

    def changed(self, weights: Tensor) -> Tensor:
        """Return changed weights (B, heads, queries, keys)."""
        count = self.layer.key_weights()
        return weights if count is None else weigh_keys(weights, count)


class KeysOutputHook(KeysHook):
    """The weights are what a module returns."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        """Return the changed weights."""
        return self.changed(output)


class KeysArgumentHook(KeysHook):
    """The weights are an argument."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments, with changed weights."""
        if isinstance(self.argument, int):
            where = self.argument
            return (*args[:where], self.changed(args[where]), *args[where + 1 :]), kwargs
        key = str(self.argument)
        return args, {**kwargs, key: self.changed(kwargs[key])}


class KeysMaskHook(KeysHook):
    """The weights are never there: their logits get a logarithm."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments, with a mask that is added to the logits."""
        count = self.layer.key_weights()
        if count is None:
            return None
        key = str(self.argument)
        bias, mask = count.log()[:, None, None, :].to(args[0].dtype), kwargs.get(key)
        if mask is not None:
            hidden = mask.dtype is torch.bool
            both = torch.where(mask, bias, -torch.inf) if hidden else bias + mask
            # Where the two leave no key at all, the first of them would be no attention.
            bias = torch.where((both > -torch.inf).any(-1, keepdim=True), both, bias)
        return args, {**kwargs, key: bias}


def order_ends(block: nn.Module) -> None:
    """Let the hooks at the end of a block run in their order.

    First those that see the tokens that the block got, then what completes them, then those that
    are to see all.
    """
    for kind in ((CompleteHook, UnmergeHook), (AllTokens,)):
        for key, hook in list(block._forward_hooks.items()):
            if isinstance(hook, kind):
                block._forward_hooks[key] = block._forward_hooks.pop(key)  # to the end


def check_alone(model: nn.Module, where: Place, owner: str) -> None:
    """See whether the blocks of a place run on all of their tokens as yet.

    Raises:
        MedsegError: another layer lets them run on fewer.
    """
    for path in (*where.chain, *(found.mlp for found in where.windows)):
        block = model.get_submodule(path)
        for hook in (*block._forward_pre_hooks.values(), *block._forward_hooks.values()):
            if isinstance(hook, (FewerTokens, MaskAgain)):
                raise MedsegError(
                    f"{owner} at '{where.name}': '{path}' runs on fewer tokens already, for "
                    f"{type(hook.layer).__name__}. Take that out first."
                )


def hang_sequence(model: nn.Module, where: Place, layer: Regularizer) -> list[RemovableHandle]:
    """Hang on the blocks of a place what lets them run on fewer tokens, if the layer is for that.

    Returns:
        What takes it off again.
    """
    handles: list[RemovableHandle] = []
    if where.windows:
        grid = (where.map_size[1], where.map_size[2])
        if isinstance(layer, PatchDropout):
            for found in where.windows:
                handles += hang_windows(model, layer, found, grid)
        return handles
    for block in map(model.get_submodule, where.chain):
        if isinstance(layer, PatchDropout):
            handles.append(block.register_forward_pre_hook(GatherHook(layer)))
            handles.append(block.register_forward_hook(CompleteHook(layer)))
        elif isinstance(layer, TokenMerging):
            handles.append(block.register_forward_pre_hook(MergeHook(layer)))
            handles.append(block.register_forward_hook(UnmergeHook(layer)))
        order_ends(block)
    if isinstance(layer, TokenMerging) and layer.proportional:
        handles += [hang_keys(model, keys, layer) for keys in where.keys]
    return handles


def hang_keys(model: nn.Module, keys: Keys, layer: KeyWeigher) -> RemovableHandle:
    """Let the keys of an attention count as a layer says; return what takes that off again."""
    module = model.get_submodule(keys.path)
    if keys.masks:
        hook = KeysMaskHook(layer, keys.argument)
        return module.register_forward_pre_hook(hook, with_kwargs=True)
    if keys.argument is None:
        return module.register_forward_hook(KeysOutputHook(layer))
    argument = KeysArgumentHook(layer, keys.argument)
    return module.register_forward_pre_hook(argument, with_kwargs=True)
