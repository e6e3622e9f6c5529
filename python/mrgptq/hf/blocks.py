"""One block of a decoder after the other: batches pass through it and leave their memory as they found it."""

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
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
