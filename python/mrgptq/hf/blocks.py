"""One block of a decoder after the other: batches pass through it and leave their memory as they found it."""

import ctypes
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.hooks import RemovableHandle

Kwargs = dict[int, dict[str, Any]]  # what a block is called with, by batch size


@contextmanager
def removing(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks in the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_block(block: torch.nn.Module, batch: torch.Tensor, kwargs: Kwargs) -> torch.Tensor:
    """A block's hidden states for a batch of them."""
    output = block(batch, use_cache=False, past_key_values=None, **kwargs[len(batch)])
    return output[0] if isinstance(output, tuple) else output


def take_place(batch: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The output in the batch's own memory. What is kept for the next block then never lies among what a block has passing through, whose memory could not be given back or serve the next batch."""
    return batch.copy_(output) if output.shape == batch.shape and output.dtype == batch.dtype else output


def give_back_memory() -> None:
    """What was freed, to the system. glibc keeps much of what passed through a block, and with more of it after every block a run would take twice what it needs; other C libraries are left alone."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


@contextmanager
def passing_by(blocks: Iterable[torch.nn.Module], answer: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Blocks that compute nothing meanwhile, with numbers or without: each answers what ``answer`` makes of it and of its input."""
    changed = list(blocks)

    def stand_in(block: torch.nn.Module) -> Callable[..., torch.Tensor]:
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            return answer(block, args[0] if args else kwargs["hidden_states"])

        return forward

    for block in changed:
        block.forward = stand_in(block)
    try:
        yield
    finally:
        for block in changed:
            del block.forward


class _FirstBlockReached(Exception):
    """Stops a forward pass once the first block's inputs are known."""


def linears_by_block(model: torch.nn.Module, prefix: str, blocks: torch.nn.ModuleList, modules: Sequence[str]) -> dict[int, list[str]]:
    """{block index: module names}, each checked to be a linear layer there."""
    by_block: dict[int, list[str]] = {}
    known = dict(model.named_modules())
    for name in modules:
        start, _, rest = name.removeprefix(prefix + ".").partition(".")
        if name.startswith(prefix + ".") and re.fullmatch("[0-9]{1,9}", start) and int(start) < len(blocks) and rest and isinstance(known.get(name), torch.nn.Linear):
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


def pass_through(block: torch.nn.Module, hidden: list[torch.Tensor], kwargs: Kwargs, *, keep: bool) -> None:
    """Pass every batch through a block; with ``keep`` its outputs take the place of the inputs."""
    for i, batch in enumerate(hidden):
        output = run_block(block, batch, kwargs)
        if keep:
            hidden[i] = take_place(batch, output)


class Ledger(Protocol):
    """Where a run keeps the inputs of the next block, so that another can go on from there."""

    def state(self) -> tuple[int, dict[str, NDArray[Any]]] | None:
        """The last of :meth:`keep_state`."""

    def keep_state(self, blocks: int, hidden: dict[str, NDArray[Any]]) -> None:
        """So many blocks are done, and the next one's inputs are these."""


def go_on(ledger: Ledger | None, **hidden: list[torch.Tensor]) -> int:
    """How many blocks an earlier run has done; the hidden states, each list under its name, become those that it kept with :func:`keep`."""
    if ledger is None or (state := ledger.state()) is None:
        return 0
    done, kept = state
    batches = {f"{name}.{i}": batch for name, each in hidden.items() for i, batch in enumerate(each)}
    if {name: (tuple(batch.shape), batch.dtype) for name, batch in batches.items()} != {name: (values.shape, torch.from_numpy(np.empty(0, values.dtype)).dtype) for name, values in kept.items()}:
        raise ValueError("what was kept between blocks is of other hidden states than these; remove the folder to begin anew")
    for name, batch in batches.items():
        batch.copy_(torch.from_numpy(np.array(kept[name])))
    return done


def keep(ledger: Ledger, blocks: int, **hidden: list[torch.Tensor]) -> None:
    """Have the hidden states kept that ``blocks`` blocks gave."""
    ledger.keep_state(blocks, {f"{name}.{i}": batch.cpu().numpy() for name, batches in hidden.items() for i, batch in enumerate(batches)})


class BlockSource:
    """Where a decoder's blocks get their numbers. This one is for a model that holds them all."""

    streamed = False
    done = 0
    """How many blocks are quantised; the next one's numbers are the original's, whatever is known of its layers."""

    def __init__(self, blocks: torch.nn.ModuleList) -> None:
        self.blocks = blocks

    @contextmanager
    def at(self, index: int) -> Iterator[torch.nn.Module]:
        """The block with its numbers, for as long as the context lasts."""
        yield self.blocks[index]
