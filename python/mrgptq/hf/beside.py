"""A block beside its original: how far the inputs of its layers, and the residual stream that they add to, have come apart."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .blocks import Kwargs, removing, run_block, take_place
from .experts import Experts

Group = tuple[str, ...]  # modules that share an input


def stream_writers(block: torch.nn.Module, batch: torch.Tensor, kwargs: Kwargs) -> tuple[str | None, str | None]:
    """The two linear layers of a block whose outputs are added to the residual stream as they are, by their paths in the block.

    The first is added to the block's input, and some module reads that sum; the second is added to that sum, and the result leaves the block. Both are told by their numbers, equal to the bit, so
    a layer whose output passes a norm, a gate or a factor on its way is none (None), nor are those of a block that adds attention and MLP to one input.
    """
    outputs: dict[str, torch.Tensor] = {}
    read: list[torch.Tensor] = []

    def keep(path: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # Routers derived from a linear layer may give several tensors; what adds nothing would seem to write anywhere.
            if isinstance(module, torch.nn.Linear) and isinstance(output, torch.Tensor) and output.shape == batch.shape and output.any():
                outputs[path] = output
            read.extend(x for x in args if isinstance(x, torch.Tensor) and x.shape == batch.shape)

        return hook

    with removing([module.register_forward_hook(keep(path)) for path, module in block.named_modules() if path]):
        left = run_block(block, batch, kwargs)
    for first, output in outputs.items():
        middle = batch + output
        if any(torch.equal(x, middle) for x in read):
            return first, next((last for last, more in outputs.items() if torch.equal(middle + more, left)), None)
    return None, None


class Apart(NamedTuple):
    """Sums over tokens, float64, of a batch's products in float32."""

    crosses: dict[Group, torch.Tensor]
    """X^T X̃, (cols, cols), of the inputs X of the original's layers and X̃ of the block's own."""
    streams: dict[str, torch.Tensor]
    """D^T X̃, (rows, cols), of the modules that write into the residual stream: by D the stream before the module falls short of the original's."""


def observe_both(
    block: torch.nn.Module, original: torch.nn.Module, groups: list[Group], named: dict[str, Any], hidden: list[torch.Tensor], original_hidden: list[torch.Tensor], kwargs: Kwargs
) -> Apart:
    """Pass every batch through a block and through its original.

    The original's outputs take the place of its inputs, for the next block; the block's own inputs stay, since its weights are still to change. Where they route tokens to experts each routes its own; what the
    original's expert would have read of the tokens that the block sends to its own is had by sending them there, too.
    """
    paths = {module: path for path, module in block.named_modules()}
    first, last = stream_writers(original, original_hidden[-1], kwargs)
    writers = {name: paths[module] for name, module in named.items() if paths[module] in (first, last)}
    device = hidden[0].device
    crosses = {group: torch.zeros(named[group[0]].in_features, named[group[0]].in_features, dtype=torch.float64, device=device) for group in groups}
    streams = {name: torch.zeros(named[name].out_features, named[name].in_features, dtype=torch.float64, device=device) for name in writers}
    asked: dict[Group, torch.Tensor] = {}  # inputs of the original's layers
    seen: dict[Group, torch.Tensor] = {}  # inputs of the block's own
    routed: dict[str, list[tuple[torch.Tensor, ...]]] = {path: [] for path, module in block.named_modules() if isinstance(module, Experts)}  # the original's inputs, then the block's own
    meant: dict[str, torch.Tensor] = {}  # outputs of the original's writers
    added: dict[str, torch.Tensor] = {}  # outputs of the block's own

    def keep_input(group: Group, store: dict[Group, torch.Tensor]) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            store[group] = args[0].flatten(0, -2)

        return hook

    def keep_output(name: str, store: dict[str, torch.Tensor]) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            store[name] = output

        return hook

    def keep_routes(path: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            routed[path].append(args)

        return hook

    handles = [part.get_submodule(path).register_forward_pre_hook(keep_routes(path)) for part in (original, block) for path in routed]
    handles += [original.get_submodule(paths[named[group[0]]]).register_forward_pre_hook(keep_input(group, asked)) for group in groups]
    # Before the hooks that round: they hand a module other inputs than it was given.
    handles += [named[group[0]].register_forward_pre_hook(keep_input(group, seen), prepend=True) for group in groups]
    handles += [original.get_submodule(path).register_forward_hook(keep_output(name, meant)) for name, path in writers.items()]
    handles += [named[name].register_forward_hook(keep_output(name, added)) for name in writers]
    with removing(handles):
        for i, batch in enumerate(hidden):
            before = original_hidden[i]
            answer, after = run_block(original, before, kwargs), run_block(block, batch, kwargs)
            for path, (own, block_own) in list(routed.items()):
                original.get_submodule(path)(own[0], *block_own[1:])
                routed[path].clear()
            for group in asked.keys() & seen.keys():  # some may never see an input
                crosses[group] += asked[group].T @ seen[group]
                for name in writers.keys() & group:
                    apart = before - batch if writers[name] == first else (answer - meant[name]) - (after - added[name])
                    streams[name] += apart.flatten(0, -2).T @ seen[group]
            seen.clear()  # or what an expert saw of one batch would meet another's, which the block sends elsewhere
            original_hidden[i] = take_place(before, answer)
    return Apart(crosses, streams)
