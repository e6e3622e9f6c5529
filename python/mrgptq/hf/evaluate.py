"""Perplexity of a model on a text, and how far its predictions are from another's."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_LOGITS = 2**26
"""Logits held at a time, 256 MB in float32."""


def evaluation_bytes(vocab_size: int, windows: int, sequence: int) -> int:
    """Peak bytes of :func:`perplexity` and :func:`divergence` beside the models: logits, their softmax and what is made of both."""
    return 3 * 4 * min(_LOGITS, windows * sequence * vocab_size)


def perplexity(model: Any, inputs: torch.Tensor, targets: torch.Tensor, *, progress: Callable[[int], None] | None = None) -> float:
    """exp of the mean negative log-likelihood of every target.

    Parameters
    ----------
    model : a causal language model of transformers.
    inputs, targets : (windows, sequence) int64, ``targets`` shifted by one token; see ``token_windows(..., targets=True)``. Windows do not see each other.
    progress : called with the number of windows done after each batch.

    Returns
    -------
    float : perplexity per token of the model's own tokenizer. Logits are reduced in float32, the sum over tokens in float64.
    """
    return tempered_perplexities(model, inputs, targets, temperatures=(1.0,), progress=progress)[0]


@torch.no_grad()
def tempered_perplexities(model: Any, inputs: torch.Tensor, targets: torch.Tensor, *, temperatures: Sequence[float], progress: Callable[[int], None] | None = None) -> list[float]:
    """:func:`perplexity` with the logits divided by each of ``temperatures``, from one pass.

    A text unlike the training text finds a model too sure of itself, and its perplexity then depends on how sure; at the temperature that suits the text it is flat in that.
    """
    device = next(model.parameters()).device
    batch = max(1, _LOGITS // (inputs.shape[1] * model.config.get_text_config().vocab_size))
    totals = [0.0] * len(temperatures)
    for x, y in zip(inputs.split(batch), targets.split(batch), strict=True):
        logits, wanted = model(input_ids=x.to(device), use_cache=False).logits.float().flatten(0, 1), y.to(device).flatten()
        for i, temperature in enumerate(temperatures):
            losses = torch.nn.functional.cross_entropy(logits / temperature, wanted, reduction="none")
            totals[i] += float(losses.double().sum())
        if progress:
            progress(len(x))
    return [math.exp(total / targets.numel()) for total in totals]


def divergence(model: Any, original: Any, inputs: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence KL(original || model) of the next token's distribution, in nats per token.

    It grows with every change of the predictions, where perplexity also moves up and down with their luck on one text; so it tells methods apart on fewer tokens.

    Parameters
    ----------
    model, original : causal language models of transformers with one vocabulary. inputs : (windows, sequence) int64.

    Returns
    -------
    float, >= 0 up to rounding: log-probabilities are float32, the sum over tokens float64.
    """
    return float(window_divergences(model, original, inputs).mean())


@torch.no_grad()
def window_divergences(model: Any, original: Any, inputs: torch.Tensor) -> NDArray[np.float64]:
    """(windows,) of what :func:`divergence` is the mean of: two models' differ by chance as windows do, and less so window by window."""
    device = next(model.parameters()).device
    batch = max(1, _LOGITS // (2 * inputs.shape[1] * model.config.get_text_config().vocab_size))
    means = []
    for x in inputs.split(batch):
        own, other = (torch.log_softmax(m(input_ids=x.to(device), use_cache=False).logits.float(), -1) for m in (model, original))
        means.append((other.exp() * (other - own)).sum(-1).double().mean(-1).cpu().numpy())
    return np.concatenate(means)
