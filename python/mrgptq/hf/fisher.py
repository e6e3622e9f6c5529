"""How much a model's predictions mind each output of a linear layer: the Fisher information, one factor of it a layer."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.utils.hooks import RemovableHandle

from ..arrays import located
from ..gptq import Hessian
from ..plan import HELD_BYTES
from .activations import to_numpy
from .blocks import BlockSource, Kwargs, passing_by, run_block

_SEED = 0x2509


def collect_output_hessians(
    model: Any, inputs: torch.Tensor, modules: Sequence[str], *, batch_windows: int = 1, threads: int | None = None, progress: Callable[[int, int], None] | None = None
) -> dict[str, Hessian]:
    """Second moments of the gradients at linear layers' outputs, by a backward pass over a text.

    To second order a change of a model's logits by d moves KL(original || changed) by d^T (diag(p) - p p^T) d / 2 a token, p being the predicted probabilities. With random signs ξ the
    vector z = sqrt(p) ξ - p (sqrt(p) · ξ) has just this second moment, so the gradient of z · logits at a layer's output has the Fisher information there. Its second moment A and that of
    the inputs, H, make the usual factored estimate: errors E of a weight cost about tr(A E H E^T) (K-FAC, Martens and Grosse 2015, arXiv 1503.05671).

    Parameters
    ----------
    model : a causal language model of transformers, in float32 on any device; it is left as it was.
    inputs : (windows, sequence) int64 tokens.
    modules : names of linear modules.
    batch_windows : windows in one pass; the logits of all their tokens are held, several times over.
    progress : called as progress(windows done, windows) after each batch.

    Returns
    -------
    {module: Hessian of out_features columns}. The signs come from a fixed seed for each window, so the same model and text give the same moments.

    Raises
    ------
    ValueError : a module that is not a linear layer or gradients that are not finite, by name; no window, a model in training mode or without a head.
    """
    _check(model, inputs, modules, batch_windows)
    moments = {name: Hessian(model.get_submodule(name).out_features) for name in modules}
    device = next(model.parameters()).device
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = _watch(model, moments, threads)
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        for first in range(0, len(inputs), batch_windows):
            batch = inputs[first : first + batch_windows].to(device)
            with torch.enable_grad():
                logits = model(input_ids=batch, use_cache=False).logits
            _backward(logits, first)
            del logits
            if progress:
                progress(first + len(batch), len(inputs))
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_()
    return moments


@torch.no_grad()
def collect_by_block(
    model: Any,
    source: BlockSource,
    first: int,
    hidden: Sequence[torch.Tensor],
    kwargs: Sequence[Kwargs],
    inputs: torch.Tensor,
    modules: Sequence[str],
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Hessian]:
    """:func:`collect_output_hessians` for a model of which one block at a time is in memory, from its block ``first`` on.

    As many windows as 4 GiB of their blocks' inputs allow pass through the blocks, forwards and then back, where each block's forward pass is done once more.

    Parameters
    ----------
    hidden : batches of inputs to the block ``first``. kwargs : what each block is called with; batch size 1 must be among it. modules : inside the blocks from ``first`` on.
    """
    moments = {name: Hessian(model.get_submodule(name).out_features) for name in modules}
    blocks = list(source.blocks)
    windows = [window for batch in hidden for window in batch.split(1)]
    each = 4 * windows[0].numel() * (len(blocks) - first + 1)
    at_once = max(1, HELD_BYTES // each)
    handles = _watch(model, moments, threads)
    try:
        for begin in range(0, len(windows), at_once):
            chunk = range(begin, min(begin + at_once, len(windows)))
            held = [[windows[i] for i in chunk]]  # inputs of the blocks from the first on, then of the head
            for index in range(first, len(blocks)):
                with source.at(index) as block:
                    held.append([run_block(block, window, kwargs[index]) for window in held[-1]])
            gradients = [_head_gradient(model, blocks, held[-1][i - begin], inputs[i : i + 1], i) for i in chunk]
            for index in range(len(blocks) - 1, first - 1, -1):
                held.pop()
                with source.at(index) as block:
                    for i, window in enumerate(held[-1]):
                        start = window.detach().requires_grad_()
                        with torch.enable_grad():
                            run_block(block, start, kwargs[index]).backward(gradient=gradients[i])
                        gradients[i] = cast(torch.Tensor, start.grad)
            if progress:
                progress(chunk.stop, len(windows))
    finally:
        for handle in handles:
            handle.remove()
    return moments


def _head_gradient(model: Any, blocks: Sequence[torch.nn.Module], last: torch.Tensor, window: torch.Tensor, number: int) -> torch.Tensor:
    """The gradient at what leaves the last block, everything behind it being run, and nothing before."""
    last = last.detach().requires_grad_()
    with torch.enable_grad(), passing_by(blocks, lambda block, hidden: last if block is blocks[-1] else hidden):
        logits = model(input_ids=window.to(last.device), use_cache=False).logits
    _backward(logits, number)
    return cast(torch.Tensor, last.grad)


def _backward(logits: torch.Tensor, first: int) -> None:
    """Passes back the vector z of :func:`collect_output_hessians`, for windows from number ``first`` on."""
    p = torch.softmax(logits.detach().float(), -1)
    signs = torch.stack([_signs(first + i, p.shape[1:]) for i in range(len(p))]).to(p.device)
    root = p.sqrt() * signs
    gradient = (root - p * root.sum(-1, keepdim=True)).to(logits.dtype)
    del p, signs, root  # each as large as the logits
    logits.backward(gradient=gradient)


def _watch(model: Any, moments: dict[str, Hessian], threads: int | None) -> list[RemovableHandle]:
    """Hooks that add each module's output gradients to its moment."""

    def watch(name: str) -> Callable[..., torch.Tensor | None]:
        def add(gradient: torch.Tensor) -> None:
            values, dtype = to_numpy(gradient)
            with located(f"the gradient at {name}"):
                moments[name].update(values, dtype=dtype, threads=threads)

        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
            if output.requires_grad:
                output.register_hook(add)
                return None
            # The first layers of a pass have nothing trainable before them: their outputs are where gradients end. What follows gets a copy, for it may change it in place.
            output.requires_grad_().register_hook(add)
            return output.clone()

        return hook

    return [model.get_submodule(name).register_forward_hook(watch(name)) for name in moments]


def _check(model: Any, inputs: torch.Tensor, modules: Sequence[str], batch_windows: int) -> None:
    known = dict(model.named_modules())
    for name in modules:
        if not isinstance(known.get(name), torch.nn.Linear):
            raise ValueError(f"{name} is not a linear layer of the model; gradients are taken at linear layers' outputs")
    if not modules:
        raise ValueError("modules is empty; there is nothing to take gradients at")
    if inputs.ndim != 2 or not inputs.numel():
        raise ValueError(f"inputs has shape {tuple(inputs.shape)}; it must be (windows, sequence), with at least one token")
    if batch_windows < 1:
        raise ValueError(f"batch_windows is {batch_windows}; it must be 1 or more")
    if model.training:
        raise ValueError("the model is in training mode, where dropout would draw another model for each window; call eval() on it")
    if getattr(model, "get_output_embeddings", lambda: True)() is None:
        raise ValueError(f"{type(model).__name__} has no head, so it predicts nothing to take gradients of")


def _signs(window: int, shape: torch.Size) -> torch.Tensor:
    """Random -1 and 1, the same for a window on every device and in any batch."""
    bits = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(_SEED + window), dtype=torch.int8)
    return (2 * bits - 1).to(torch.float32)
