"""A decoder's blocks in order, each open to whoever replaces its layers by others, in NumPy."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..arrays import located
from ..modules import fused_groups
from .activations import replace_inputs
from .beside import Group
from .blocks import Kwargs, enter, linears_by_block, pass_through, removing
from .model import decoder_blocks
from .observe import layer_weights

Values = NDArray[np.float32]


@dataclass(frozen=True)
class OpenBlock:
    """A block of a decoder with what reaches it. groups : tuples of names of its layers that share an input."""

    groups: list[Group]
    _model: Any
    _block: torch.nn.Module
    _hidden: list[torch.Tensor]
    _kwargs: Kwargs

    def weights(self, group: Group) -> dict[str, Values]:
        """{module: (rows, cols) float32}, the model's own memory where that is the CPU's."""
        return layer_weights(self._model, group)

    @torch.no_grad()
    def observe(self, watch: Callable[[Group, Values], None], rounding: Mapping[Group, Callable[[Values], Values]] | None = None) -> None:
        """One pass of the text through the block, which leaves it as it was. ``watch`` is called with each group's inputs, (..., cols) float32, batch by batch; ``rounding``: what the layers compute with instead of them meanwhile."""

        def watching(group: Group) -> Callable[..., None]:
            def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
                with located(f"the input of {group[0]}"):
                    watch(group, _values(args[0]))

            return hook

        handles = [self._model.get_submodule(group[0]).register_forward_pre_hook(watching(group)) for group in self.groups]
        for group, make in (rounding or {}).items():
            handles += self._hook(group, make)
        with removing(handles):
            pass_through(self._block, self._hidden, self._kwargs, keep=False)

    @torch.no_grad()
    def replace(self, module: str, weight: Values) -> None:
        """Let a layer compute with another weight, (rows, cols)."""
        parameter = self._model.get_submodule(module).weight
        parameter.copy_(torch.from_numpy(weight).to(parameter.device))

    def replace_inputs(self, group: Group, make: Callable[[Values], Values]) -> None:
        """Let layers compute with what ``make`` makes of their inputs, from now on."""
        self._hook(group, make)

    def _hook(self, group: Group, make: Callable[[Values], Values]) -> list[Any]:
        def rounded(x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(make(_values(x)))).to(device=x.device, dtype=x.dtype)

        return replace_inputs([self._model.get_submodule(name) for name in group], None, rounded)


@torch.no_grad()
def walk(model: Any, inputs: torch.Tensor, modules: Sequence[str], *, batch_windows: int = 8) -> Iterator[OpenBlock]:
    """The blocks of a decoder as a text reaches them: what was done to one when the next is asked for is what the next one gets to see.

    Parameters
    ----------
    model : a causal decoder of transformers; its weights and hooks are changed by the caller. inputs : (windows, sequence) int64 tokens.
    modules : names of linear modules, all of them inside the decoder's blocks. batch_windows : windows in one forward pass of a block.

    Raises
    ------
    ValueError : a module that is not a linear layer inside a block, by name.
    """
    prefix, blocks = decoder_blocks(model)
    linears = linears_by_block(model, prefix, blocks, modules)
    hidden, block_kwargs = enter(model, blocks, inputs, batch_windows)
    for index, block in enumerate(blocks):
        yield OpenBlock(fused_groups(linears.get(index, [])), model, block, hidden, block_kwargs[index])
        if index + 1 < len(blocks):
            pass_through(block, hidden, block_kwargs[index], keep=True)


def _values(x: torch.Tensor) -> Values:
    return x.detach().float().cpu().numpy()
