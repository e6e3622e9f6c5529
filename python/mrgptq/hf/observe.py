"""What a model's linear layers see and hold: second moments of their inputs, weights."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..arrays import located
from ..gptq import Hessian
from ..modules import fused_groups
from .activations import to_numpy
from .blocks import BlockSource, Ledger, enter, give_back_memory, go_on, keep, linears_by_block, pass_through, removing
from .model import decoder_blocks


@torch.no_grad()
def observe_hessians(
    model: Any,
    inputs: torch.Tensor,
    modules: Sequence[str],
    *,
    batch_windows: int = 8,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    ledger: Ledger | None = None,
    source: BlockSource | None = None,
) -> Iterator[tuple[tuple[str, ...], Hessian]]:
    """(modules that share an input, Hessian of it) over a text, block after block of the model as it is; one block's are held at a time.

    Parameters
    ----------
    inputs : (windows, sequence) int64 tokens. modules : linear layers inside the decoder's blocks. batch_windows : windows in one forward pass of a block.
    progress : called as progress(modules done, modules). source : where the blocks get their numbers; None where the model holds them all.
    ledger : where to go on from what an earlier call with the same arguments has done, and to keep what this one does; the groups of blocks that were done are not observed again.

    Raises
    ------
    ValueError : a module that is not a linear layer inside a block, an input that is not finite, by name.
    """
    prefix, blocks = decoder_blocks(model)
    source = source or BlockSource(blocks)
    linears = linears_by_block(model, prefix, blocks, modules)
    hidden, kwargs = enter(model, blocks, inputs, batch_windows)
    start, end = go_on(ledger, hidden=hidden), max(linears, default=-1) + 1
    done = sum(len(names) for index, names in linears.items() if index < start)
    for index in range(start, end):
        hessians = {group: Hessian(model.get_submodule(group[0]).in_features) for group in fused_groups(linears.get(index, []))}

        def watch(name: str, hessian: Hessian) -> Callable[..., None]:
            def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
                values, dtype = to_numpy(args[0])
                with located(f"the input of {name}"):
                    hessian.update(values, dtype=dtype, threads=threads)

            return hook

        with source.at(index) as block, removing([model.get_submodule(group[0]).register_forward_pre_hook(watch(group[0], hessian)) for group, hessian in hessians.items()]):
            pass_through(block, hidden, kwargs[index], keep=True)
        give_back_memory()
        for group in list(hessians):
            done += len(group)
            if progress:
                progress(done, len(modules))
            yield group, hessians.pop(group)
        if ledger and index + 1 < end:
            keep(ledger, index + 1, hidden=hidden)


def collect_hessians(model: Any, inputs: torch.Tensor, modules: Sequence[str], *, batch_windows: int = 8, threads: int | None = None, progress: Callable[[int, int], None] | None = None) -> dict[str, Hessian]:
    """{module: Hessian of its inputs}: all of :func:`observe_hessians` at once, block by block too. ``mrgptq.save_hessians`` stores them; modules that share an input share the Hessian."""
    return {name: hessian for group, hessian in observe_hessians(model, inputs, modules, batch_windows=batch_windows, threads=threads, progress=progress) for name in group}


def layer_weights(model: Any, modules: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """{module: (rows, cols) float32 weight} of linear modules."""
    return {name: to_numpy(model.get_submodule(name).weight.float())[0] for name in modules}
