"""Text on its way into a decoder's blocks and through them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .blocks import Kwargs, passing_by, removing, run_block, take_place


class _FirstBlockReached(Exception):
    """Stops a forward pass once the first block's inputs are known."""


def linears_by_block(model: torch.nn.Module, prefix: str, blocks: torch.nn.ModuleList, modules: Sequence[str]) -> dict[int, list[str]]:
    """{block index: module names}, each checked to be a linear layer there."""
    by_block: dict[int, list[str]] = {}
    known = dict(model.named_modules())
    for name in modules:
        start, _, rest = name.removeprefix(prefix + ".").partition(".")
        if name.startswith(prefix + ".") and start.isdigit() and int(start) < len(blocks) and rest and isinstance(known.get(name), torch.nn.Linear):
            by_block.setdefault(int(start), []).append(name)
        else:
            raise ValueError(f"{name} is not a linear layer inside {prefix}.0 … {prefix}.{len(blocks) - 1}, where calibration works; leave it out with ignore")
    return by_block


def enter(model: Any, blocks: torch.nn.ModuleList, inputs: torch.Tensor, batch_windows: int, *, one_by_one: bool = False) -> tuple[list[torch.Tensor], list[Kwargs]]:
    """Run the model up to its first block: the hidden states as batches, and for each block the keyword arguments it is called with, by batch size.

    Masks and position embeddings may differ from block to block (sliding windows), so one pass for each batch size collects them, in which the blocks compute nothing. ``one_by_one``: batches of one window, too.
    """
    decoder = model.base_model  # without the head, whose logits would take more room than everything else
    batches = list(inputs.split(batch_windows))
    device = model.get_input_embeddings().weight.device
    block_kwargs: list[Kwargs] = [{} for _ in blocks]
    hidden: list[torch.Tensor] = []
    size = 0

    def note_kwargs(index: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            block_kwargs[index][size] = {name: value for name, value in kwargs.items() if name not in ("hidden_states", "past_key_values", "use_cache")}

        return hook

    def stop(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])
        raise _FirstBlockReached

    for size in sorted({len(batch) for batch in batches} | ({1} if one_by_one else set())):
        handles = [block.register_forward_pre_hook(note_kwargs(i), with_kwargs=True) for i, block in enumerate(blocks)]
        with removing(handles), passing_by(blocks, lambda block, hidden: hidden):
            decoder(input_ids=inputs[:size].to(device), use_cache=False)
    with removing([blocks[0].register_forward_pre_hook(stop, with_kwargs=True)]):
        for batch in batches:
            try:
                decoder(input_ids=batch.to(device), use_cache=False)
            except _FirstBlockReached:
                pass
    return hidden, block_kwargs


def run_batches(block: torch.nn.Module, hidden: list[torch.Tensor], kwargs: Kwargs, *, keep: bool) -> None:
    """Pass every batch through a block; with ``keep`` its outputs take the place of the inputs."""
    for i, batch in enumerate(hidden):
        output = run_block(block, batch, kwargs)
        if keep:
            hidden[i] = take_place(batch, output)
