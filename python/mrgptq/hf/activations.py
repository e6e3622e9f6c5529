"""Rounds the inputs of linear layers as 4-bit kernels do: rotate, round to the grid, turn back."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.hooks import RemovableHandle

from ..activations import round_activations
from ..arrays import pad_columns
from ..formats import block_format
from ..result import Activations
from ..rotations import Rotation
from .shared import SharedInput


def to_numpy(x: torch.Tensor) -> tuple[NDArray[Any], str | None]:
    """A tensor as (array, dtype argument): bfloat16 as its bits, everything else as float32; no copy where it lies on the CPU."""
    x = x.detach().cpu()
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.int16).numpy().view(np.uint16), "bfloat16"
    return x.to(torch.float32).numpy(), None


def rounded(x: torch.Tensor, activations: Activations, rotation: Rotation) -> torch.Tensor:
    """``x`` (..., cols) as the layer sees it: x T rounded to the grid, times T^-1; a tensor of x's dtype and device. The tensor scale, where unknown, comes from amax(x T). Where no group divides the columns zeros are
    behind them meanwhile."""
    values, dtype = to_numpy(x)
    cols = values.shape[-1]
    values = pad_columns(values, -cols % block_format(activations.format).group_size)
    values = round_activations(values, activations.format, rule=activations.rule, mx_rule=activations.mx_rule, tensor_scale=activations.tensor_scale, rotation=rotation, dtype=dtype)
    if rotation.block_size:
        rotation.apply_inverse(values, out=values)
    return torch.from_numpy(np.ascontiguousarray(values[..., :cols])).to(device=x.device, dtype=x.dtype)


def replace_inputs(modules: Iterable[torch.nn.Module], how: object, make: Callable[[torch.Tensor], torch.Tensor], shared: SharedInput | None = None) -> list[RemovableHandle]:
    """Hook linear modules so that they compute with what ``make`` makes of their input; of an input that several of them read, or others with the same ``shared`` and an equal ``how``, it is made once.
    Returns the handles; ``handle.remove()`` undoes it."""
    last = SharedInput() if shared is None else shared

    def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (last.of(args[0], how, lambda: make(args[0])), *args[1:])

    return [module.register_forward_pre_hook(hook) for module in modules]


def round_inputs(modules: Iterable[torch.nn.Module], activations: Activations, rotation: Rotation, shared: SharedInput | None = None) -> list[RemovableHandle]:
    """:func:`replace_inputs` by what :func:`rounded` makes of them."""
    return replace_inputs(modules, (activations, rotation), lambda x: rounded(x, activations, rotation), shared)
