"""What a layer with 4-bit inputs multiplies: its inputs as codes and scales, or as the values that these stand for."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from .arrays import as_output, as_threads, refuse_nonfinite
from .codecs import Rounding, clip_mask
from .result import QuantizedMatrix
from .rotations import Identity, Rotation


def _rounds_sixths(x: ArrayLike, dtype: str | None, rotation: Rotation | None) -> bool:
    """Whether absmax / 6 is rounded to bfloat16: x is bfloat16 and is not turned before."""
    own = getattr(x, "dtype", None)
    bfloat16 = dtype == "bfloat16" or own == "BF16" or getattr(own, "name", None) == "bfloat16"  # "BF16": a StoredTensor's
    return bfloat16 and (rotation is None or isinstance(rotation, Identity))


def quantize_activations(
    x: ArrayLike,
    format: str,
    *,
    rule: str = "absmax",
    mx_rule: str = "even",
    tensor_scale: float | None = None,
    rotation: Rotation | None = None,
    dtype: str | None = None,
    threads: int | None = None,
) -> QuantizedMatrix:
    """A layer's inputs as 4-bit codes and scales: turned, scaled and rounded in one pass over memory.

    Parameters
    ----------
    x : (..., cols) array, finite, dtypes and the treatment of bfloat16 as in :func:`round_activations`; every leading axis counts tokens.
    rule, mx_rule : as in :func:`quantize`; the rule "quest" brings its ``clip_mask``.
    tensor_scale : the NVFP4 divisor, calibrated in checkpoints; None takes 2688 / amax(x T), which reads x once more.
    rotation : turns x first: ``Hadamard(k)``, or ``Dense(matrix)`` for any matrix at run time. ``dequantize(unrotate=True)`` turns back.

    Returns
    -------
    QuantizedMatrix : codes (tokens, cols / 2), scales (tokens, cols / group_size), whose values are those of :func:`round_activations` with the same arguments; no report.
        ``to_blocked(q.scales)`` has the scales in the tiles that tensor cores read. Same bytes for any number of threads and on every machine.

    Raises
    ------
    ValueError : "x has 100 columns; nvfp4 needs a multiple of 16", the first entry that is not finite, or an unknown name. TypeError : another dtype.

    References
    ----------
    Egiazarian et al. 2025 (arXiv 2509.23202), section 5: the fused kernels of QuTLASS.
    """
    work = Rounding(x, "x", format, rule, "rule", mx_rule, tensor_scale, rotation, dtype, threads, bfloat16_sixth=_rounds_sixths(x, dtype, rotation))
    codes, scales, position = _core.quantize(*work.arguments, as_threads(threads))
    refuse_nonfinite(work.values, position, "x")
    rotation = rotation or Identity()
    mask = clip_mask(format, rotation.apply(work.matrix, threads=threads), scales, work.divisor) if work.search == "quest" else None
    return QuantizedMatrix(format, codes, scales, work.divisor, rotation, clip_mask=mask)


def round_activations(
    x: ArrayLike,
    format: str,
    *,
    rule: str = "absmax",
    mx_rule: str = "even",
    tensor_scale: float | None = None,
    rotation: Rotation | None = None,
    dtype: str | None = None,
    out: NDArray[np.float32] | None = None,
    threads: int | None = None,
) -> NDArray[np.float32]:
    """The values that a layer with 4-bit inputs computes with: ``x`` rounded to the grid of ``format``.

    Parameters
    ----------
    x : (..., cols) array, finite, dtypes as in :func:`quantize`. Of a bfloat16 ``x`` the rule "absmax" rounds amax / 6 to bfloat16 before it becomes an NVFP4 scale: compressed-tensors
        divides in the input's own dtype, and up to 2.4 % of the scales differ from the float32 rule's.
    rule : a scale rule of :func:`quantize`; "absmax" is what stock kernels do, "mse" costs a search a group and loses less.
    tensor_scale : the NVFP4 divisor, calibrated in checkpoints; None takes 2688 / amax(x T).
    rotation : turns x first, in the same pass; the result stays turned. A turned bfloat16 ``x`` is float32, and rounds as that.
    out : float32 array of x's shape; ``out=x`` rounds in place.

    Returns
    -------
    float32 array of x's shape.
    """
    # What is not finite is found on the way where nothing of the caller's is written before.
    work = Rounding(x, "x", format, rule, "rule", mx_rule, tensor_scale, rotation, dtype, threads, finite=out is not None, bfloat16_sixth=_rounds_sixths(x, dtype, rotation))
    in_place = out is x
    out = as_output(np.empty(work.values.shape, dtype=np.float32) if out is None else out, work.values.shape)
    if not in_place and np.may_share_memory(out, work.matrix):
        work.matrix = work.matrix.copy()  # a shifted overlap would read what was just written
    position = _core.round_to_grid(*work.arguments, out.reshape(-1, out.shape[-1]), as_threads(threads))
    refuse_nonfinite(work.values, position, "x")
    return out
