"""Calibration block by block: each block is quantised under the inputs it gets from the quantised blocks before it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from ..arrays import located
from ..codecs import nvfp4_tensor_scale, tensor_scale_for
from ..gptq import Hessian
from ..layer import make_factor, quantize_layer
from ..modules import fused_groups
from ..recipe import Recipe
from ..result import Activations, QuantizedMatrix
from ..rotations import rotation_of
from .activations import round_inputs, to_numpy
from .model import decoder_blocks

_Group = tuple[str, ...]  # modules that share an input
_Kwargs = dict[int, dict[str, Any]]  # what a block is called with, by batch size


class _FirstBlockReached(Exception):
    """Stops a forward pass once the first block's inputs are known."""


@torch.no_grad()
def calibrate(
    model: Any, inputs: torch.Tensor, recipe: Recipe, modules: Sequence[str], *, batch_windows: int = 8, threads: int | None = None, progress: Callable[[str], None] | None = None
) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Quantise a decoder's linear layers in order, and the model with them.

    The Hessian of a layer is taken from its inputs before they are rounded. At W4A4 the layers of a block compute with rounded inputs meanwhile, its weights being the original
    ones; then the block's weights are replaced and its outputs feed the next block.

    Parameters
    ----------
    model : a causal decoder of transformers (tried: Llama, Qwen3), float32; its weights and hooks are changed.
    inputs : (windows, sequence) int64 tokens.
    recipe : Recipe.
    modules : names of the linear modules to quantise, all of them inside the decoder's blocks.
    batch_windows : windows in one forward pass of a block.
    progress : called with the name of each module that is done.

    Yields
    ------
    (module name, QuantizedMatrix), block by block. NVFP4 tensor scales, and activation scales, are equal within q/k/v and within gate/up.

    Raises
    ------
    ValueError : a module that is not a linear layer inside a block, or that never saw an input, by name.
    """
    prefix, blocks = decoder_blocks(model)
    linears = _linears_by_block(model, prefix, blocks, modules)
    hidden, block_kwargs = _enter(model, blocks, inputs, batch_windows)
    for index, block in enumerate(blocks):
        groups = fused_groups(linears.get(index, []))
        named = {name: model.get_submodule(name) for group in groups for name in group}
        hessians, activations = _observe(block, groups, named, hidden, block_kwargs[index], recipe, threads)
        for group in groups:
            yield from _quantize_group(group, named, hessians.pop(group), activations.get(group), recipe, threads, progress)
            if group in activations:
                round_inputs([named[name] for name in group], activations[group], rotation_of(recipe.rotation))
        if index + 1 < len(blocks):
            _run(block, hidden, block_kwargs[index], keep=True)


def _linears_by_block(model: torch.nn.Module, prefix: str, blocks: torch.nn.ModuleList, modules: Sequence[str]) -> dict[int, list[str]]:
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


def _enter(model: Any, blocks: torch.nn.ModuleList, inputs: torch.Tensor, batch_windows: int) -> tuple[list[torch.Tensor], list[_Kwargs]]:
    """Run the model up to its first block: the hidden states as batches, and for each block the keyword arguments it is called with, by batch size.

    Masks and position embeddings may differ from block to block (sliding windows), so one whole pass for each batch size collects them.
    """
    decoder = model.base_model  # without the head, whose logits would take more room than everything else
    batches = list(inputs.split(batch_windows))
    device = next(model.parameters()).device
    block_kwargs: list[_Kwargs] = [{} for _ in blocks]
    hidden: list[torch.Tensor] = []
    size = 0

    def note_kwargs(index: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            block_kwargs[index][size] = {name: value for name, value in kwargs.items() if name not in ("hidden_states", "past_key_values", "use_cache")}

        return hook

    def stop(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])
        raise _FirstBlockReached

    for size in sorted({len(batch) for batch in batches}):
        handles = [block.register_forward_pre_hook(note_kwargs(i), with_kwargs=True) for i, block in enumerate(blocks)]
        with _removing(handles):
            decoder(input_ids=batches[-1 if size == len(batches[-1]) else 0].to(device), use_cache=False)
    with _removing([blocks[0].register_forward_pre_hook(stop, with_kwargs=True)]):
        for batch in batches:
            try:
                decoder(input_ids=batch.to(device), use_cache=False)
            except _FirstBlockReached:
                pass
    return hidden, block_kwargs


def _run(block: torch.nn.Module, hidden: list[torch.Tensor], kwargs: _Kwargs, *, keep: bool) -> None:
    """Pass every batch through a block; with ``keep`` its outputs take the place of the inputs."""
    for i, batch in enumerate(hidden):
        output = block(batch, use_cache=False, past_key_values=None, **kwargs[len(batch)])
        if keep:
            hidden[i] = output[0] if isinstance(output, tuple) else output


def _observe(
    block: torch.nn.Module, groups: list[_Group], named: dict[str, Any], hidden: list[torch.Tensor], kwargs: _Kwargs, recipe: Recipe, threads: int | None
) -> tuple[dict[_Group, Hessian], dict[_Group, Activations]]:
    """One pass of a block: {group: Hessian} of the inputs before rounding, and at W4A4 {group: Activations} with the calibrated tensor scale."""
    rotation = rotation_of(recipe.rotation)
    hessians = {group: Hessian(named[group[0]].in_features) for group in groups}
    largest = dict.fromkeys(groups, 0.0)
    handles: list[RemovableHandle] = []

    def watch(group: _Group) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            values, dtype = to_numpy(args[0])
            with located(f"the input of {group[0]}"):
                hessians[group].update(values, dtype=dtype, threads=threads)
            if recipe.activations == "nvfp4":
                largest[group] = max(largest[group], float(np.abs(rotation.apply(values, dtype=dtype, threads=threads)).max(initial=0)))

        return hook

    for group in groups:
        handles.append(named[group[0]].register_forward_pre_hook(watch(group)))
        if recipe.activations:
            # Until the calibrated scale is known each batch is rounded by its own.
            handles += round_inputs([named[name] for name in group], Activations(recipe.activations, recipe.mx_rule), rotation)
    with _removing(handles):
        _run(block, hidden, kwargs, keep=False)
    for group, hessian in hessians.items():
        if not hessian.tokens:
            raise ValueError(f"{group[0]} never saw an input while the calibration text passed; leave it out with ignore")
    if not recipe.activations:
        return hessians, {}
    scales: dict[_Group, float | None] = {group: nvfp4_tensor_scale(largest[group]) if recipe.activations == "nvfp4" else None for group in groups}
    return hessians, {group: Activations(recipe.activations, recipe.mx_rule, scales[group]) for group in groups}


def _quantize_group(
    group: _Group, named: dict[str, Any], hessian: Hessian, activations: Activations | None, recipe: Recipe, threads: int | None, progress: Callable[[str], None] | None
) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Quantise the layers of one group under one Hessian, factor and tensor scale, and put their values into the model."""
    rotation = rotation_of(recipe.rotation)
    weights = {name: to_numpy(named[name].weight)[0] for name in group}
    tensor_scale = None
    if recipe.format == "nvfp4":
        with located(", ".join(group)):
            tensor_scale = min(tensor_scale_for("nvfp4", rotation.apply(weight, threads=threads), threads=threads) for weight in weights.values())
    factor = make_factor(hessian, recipe, threads=threads) if recipe.solver == "gptq" else None
    for name, weight in weights.items():
        with located(name):
            matrix = quantize_layer(weight, hessian, recipe, tensor_scale=tensor_scale, factor=factor, threads=threads)
        matrix = replace(matrix, activations=activations)
        parameter = named[name].weight
        parameter.copy_(torch.from_numpy(matrix.dequantize(unrotate=True, threads=threads)).to(parameter.device))
        if progress:
            progress(name)
        yield name, matrix


@contextmanager
def _removing(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
