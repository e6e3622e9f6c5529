"""Calibration block by block: each block is quantised under the inputs it gets from the quantised blocks before it."""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.hooks import RemovableHandle

from ..arrays import located, pad_columns
from ..codecs import nvfp4_tensor_scale
from ..gptq import Hessian, backward_passes
from ..group import Moments, quantize_together
from ..layer import activations_of
from ..modules import fused_groups
from ..recipe import Recipe
from ..result import Activations, QuantizedMatrix
from ..rotations import Rotation
from .activations import round_inputs, to_numpy
from .beside import Apart, Group, observe_both
from .blocks import BlockSource, Kwargs, Ledger, enter, give_back_memory, go_on, keep, linears_by_block, pass_through, removing
from .fisher import collect_by_block, collect_output_hessians
from .model import decoder_blocks


class QuantizedLedger(Ledger, Protocol):
    """Where a run keeps what it has quantised, too."""

    def matrix(self, module: str) -> QuantizedMatrix | None:
        """The module as an earlier run quantised it."""

    def output_hessians(self, first_block: int) -> dict[str, Hessian] | None:
        """What the backward pass before that block gave."""

    def keep_output_hessians(self, first_block: int, hessians: dict[str, Hessian]) -> None:
        """The same to be kept."""


@torch.no_grad()
def calibrate(
    model: Any,
    inputs: torch.Tensor,
    recipe: Recipe,
    modules: Sequence[str],
    *,
    batch_windows: int = 8,
    threads: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    ledger: QuantizedLedger | None = None,
    source: BlockSource | None = None,
    elsewhere: Callable[[Iterable[tuple[Group, Moments]]], None] | None = None,
) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Quantise a decoder's linear layers in order, and the model with them.

    The Hessian of a layer is taken from its inputs before they are rounded. At W4A4 the layers of a block compute with rounded inputs meanwhile, its weights being the original
    ones; then the block's weights are replaced and its outputs feed the next block. Where ``recipe.cross`` is above 0, the original blocks are run beside the quantised ones on what the
    original model would have handed them, and each layer's target makes up for part of the difference; layers whose outputs are added to the residual stream make up for the stream's, too
    (where a block adds them as they are: not behind a norm, as Gemma 2 does, nor weighted, as experts are). Where ``recipe.output_hessian`` is set, a backward pass through the
    model, the blocks before being quantised by then, measures what each layer's outputs matter; blocks share such a pass as far as their matrices fit into 4 GiB.

    Parameters
    ----------
    model : a causal decoder of transformers (tried: Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3, and models with experts, see :mod:`.experts`), float32; its weights and hooks are changed.
    inputs : (windows, sequence) int64 tokens.
    recipe : Recipe.
    modules : names of the linear modules to quantise, all of them inside the decoder's blocks.
    batch_windows : windows in one forward pass of a block.
    progress : called as progress(stage, done, total): "gradients" counts the windows of a backward pass, "quantise" the modules.
    ledger : where to go on from what an earlier call with the same arguments has done, and to keep what this one does.
    source : where the blocks get their numbers; None where the model holds them all.
    elsewhere : quantises a block's groups of layers under what is known of them, which it takes one by one, and returns when the ledger, which it needs, has all of them. None quantises them here, one after the other.

    Yields
    ------
    (module name, QuantizedMatrix), block by block, without those that the ledger has, by whomever. NVFP4 tensor scales, and activation scales, are equal within q/k/v and within gate/up.

    Raises
    ------
    ValueError : a module that is not a linear layer inside a block, by name. One that never sees an input is rounded plainly, which its report says.
    """
    prefix, blocks = decoder_blocks(model)
    source = source or BlockSource(blocks)
    linears = linears_by_block(model, prefix, blocks, modules)
    hidden, block_kwargs = enter(model, blocks, inputs, batch_windows, one_by_one=source.streamed and recipe.output_hessian is not None)
    give_back_memory()
    original_hidden = [batch.clone() for batch in hidden] if recipe.cross else []
    passes = _backward_passes(model, linears) if recipe.output_hessian else {}
    output_hessians: dict[str, Hessian] = {}
    done = first = 0
    start = go_on(ledger, hidden=hidden, original=original_hidden)
    for index in range(len(blocks)):
        source.done = index
        groups = fused_groups(linears.get(index, []))
        named = {name: model.get_submodule(name) for group in groups for name in group}
        if index in passes:
            first, output_hessians = index, {}
        if index < start:
            for group in groups:
                _take_over(group, named, cast(QuantizedLedger, ledger), recipe, threads, weights=not source.streamed)
            continue
        if recipe.output_hessian and not output_hessians and groups:
            output_hessians = (ledger and ledger.output_hessians(first)) or {}
            if not output_hessians:
                gradients_done = partial(progress, "gradients") if progress else None
                if source.streamed:
                    output_hessians = collect_by_block(model, source, first, hidden, block_kwargs, inputs, passes[first], threads=threads, progress=gradients_done)
                else:
                    output_hessians = collect_output_hessians(model, inputs, passes[first], threads=threads, progress=gradients_done)
                if ledger:
                    ledger.keep_output_hessians(first, output_hessians)
        with source.at(index) as block:
            # Of a block in which an earlier run was cut short some layers are quantised already; what is observed are the original's.
            original = copy.deepcopy(block) if recipe.cross else None
            hessians, activations, apart = _observe(block, groups, named, hidden, block_kwargs[index], recipe, threads, original, original_hidden)
            del original
            give_back_memory()
            known = partial(_take, hessians=hessians, apart=apart, output_hessians=output_hessians, activations=activations)
            if elsewhere:
                elsewhere((group, known(group)) for group in groups if cast(QuantizedLedger, ledger).matrix(group[0]) is None)
            for group in groups:
                if ledger and _take_over(group, named, ledger, recipe, threads):
                    continue
                for name, matrix in quantize_together({name: to_numpy(named[name].weight)[0] for name in group}, known(group), recipe, threads=threads):
                    _replace_weight(named[name], matrix, threads)
                    done += 1
                    if progress:
                        progress("quantise", done, len(modules))
                    yield name, matrix
                if group in activations:
                    round_inputs([named[name] for name in group], activations[group], _rotation(group, named, recipe))
            del known, hessians, apart  # where an earlier run had quantised layers, theirs are left
            if index + 1 < len(blocks):
                pass_through(block, hidden, block_kwargs[index], keep=True)
                give_back_memory()
        if ledger and index + 1 < len(blocks):
            keep(ledger, index + 1, hidden=hidden, original=original_hidden)


def _take_over(group: Group, named: dict[str, Any], ledger: QuantizedLedger, recipe: Recipe, threads: int | None, *, weights: bool = True) -> bool:
    """Let a group compute as an earlier run quantised it; False where it had not come so far. ``weights``: put them into the model, which otherwise takes them from where its blocks come from."""
    matrices = {name: ledger.matrix(name) for name in group}
    for name, matrix in matrices.items():
        if matrix is None:
            return False
        if weights:
            _replace_weight(named[name], matrix, threads)
    activations = next(iter(matrices.values())).activations  # type: ignore[union-attr]
    if activations:
        round_inputs([named[name] for name in group], activations, _rotation(group, named, recipe))
    return True


def _rotation(group: Group, named: dict[str, Any], recipe: Recipe) -> Rotation:
    return recipe.fit(named[group[0]].in_features, group[0])[1]


def _replace_weight(module: Any, matrix: QuantizedMatrix, threads: int | None) -> None:
    module.weight.copy_(torch.from_numpy(matrix.dequantize(unrotate=True, threads=threads)).to(module.weight.device))


def _backward_passes(model: Any, linears: dict[int, list[str]]) -> dict[int, list[str]]:
    """{index of the first block: modules} of each backward pass."""
    blocks = sorted(linears)
    passes = backward_passes([[model.get_submodule(name).out_features for name in linears[index]] for index in blocks])
    return {blocks[group[0]]: [name for at in group for name in linears[blocks[at]]] for group in passes}


def _observe(
    block: torch.nn.Module,
    groups: list[Group],
    named: dict[str, Any],
    hidden: list[torch.Tensor],
    kwargs: Kwargs,
    recipe: Recipe,
    threads: int | None,
    original: torch.nn.Module | None,
    original_hidden: list[torch.Tensor],
) -> tuple[dict[Group, Hessian], dict[Group, Activations], Apart]:
    """One pass of a block: {group: Hessian} of the inputs before rounding, at W4A4 {group: Activations} with the calibrated tensor scale, and how far the
    block and the original have come apart where there is an original to compare with."""
    apart = Apart({}, {})
    hessians = {group: Hessian(named[group[0]].in_features) for group in groups}
    largest = dict.fromkeys(groups, 0.0)
    handles: list[RemovableHandle] = []

    def watch(group: Group) -> Callable[..., None]:
        padding, rotation = recipe.fit(named[group[0]].in_features, group[0])

        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            values, dtype = to_numpy(args[0])
            with located(f"the input of {group[0]}"):
                hessians[group].update(values, dtype=dtype, threads=threads)
            if recipe.activations == "nvfp4":
                largest[group] = max(largest[group], float(np.abs(rotation.apply(pad_columns(values, padding), dtype=dtype, threads=threads)).max(initial=0)))

        return hook

    for group in groups:
        handles.append(named[group[0]].register_forward_pre_hook(watch(group)))
        if recipe.activations:
            # Until the calibrated scale is known each batch is rounded by its own.
            handles += round_inputs([named[name] for name in group], cast(Activations, activations_of(recipe)), _rotation(group, named, recipe))
    with removing(handles):
        if original is None:
            pass_through(block, hidden, kwargs, keep=False)
        else:
            apart = observe_both(block, original, groups, named, hidden, original_hidden, kwargs)
    if not recipe.activations:
        return hessians, {}, apart
    _lend_to_unreached(largest)
    scales: dict[Group, float | None] = {group: nvfp4_tensor_scale(largest[group]) if recipe.activations == "nvfp4" else None for group in groups}
    return hessians, {group: cast(Activations, activations_of(recipe, scales[group])) for group in groups}, apart


def _lend_to_unreached(largest: dict[Group, float]) -> None:
    """Give experts that no token reached the largest input of their fellows: runtimes take one scale for all of a layer's, and that of an expert of which nothing is known must not decide it."""
    fellows: dict[str, float] = {}
    kind = {group: re.sub(r"\.experts\.\d+\.", ".experts.", group[0]) for group in largest}
    for group, value in largest.items():
        fellows[kind[group]] = max(value, fellows.get(kind[group], 0.0))
    largest.update({group: fellows[kind[group]] for group, value in largest.items() if value == 0})


def _take(group: Group, hessians: dict[Group, Hessian], apart: Apart, output_hessians: dict[str, Hessian], activations: dict[Group, Activations]) -> Moments:
    """What is known of a group, out of what is known of its block and then held by nobody else."""
    hessian, cross = hessians.pop(group), apart.crosses.pop(group, None)
    streams = {name: apart.streams.pop(name) for name in group if name in apart.streams}
    outputs = {name: output_hessians.pop(name) for name in group if name in output_hessians}

    def mean(total: torch.Tensor) -> NDArray[np.float64]:
        return total.cpu().numpy() / hessian.tokens

    if cross is None or not hessian.tokens:
        return Moments(hessian, None, {}, outputs, activations.get(group))
    return Moments(hessian, mean(cross), {name: mean(total) for name, total in streams.items()}, outputs, activations.get(group))
