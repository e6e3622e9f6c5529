"""Products with packed weights."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from .activations import quantize_activations
from .arrays import as_float32, as_output, as_threads, choose, pad_columns
from .formats import FORMATS
from .prepack import PrepackedMatrix
from .result import Activations, QuantizedMatrix
from .rotations import Identity


def matmul(
    x: ArrayLike | QuantizedMatrix,
    q: QuantizedMatrix | PrepackedMatrix,
    *,
    activations: str | Activations | None = None,
    dtype: str | None = None,
    out: NDArray[np.float32] | None = None,
    threads: int | None = None,
) -> NDArray[np.float32]:
    """x W^T for the weight W that ``q`` stands for, in the original basis: what a linear layer answers, with inputs as they are (W4A16) or rounded before. The weight is read packed.

    Parameters
    ----------
    x : (..., cols) array, dtypes as in :func:`quantize`, finite. Where ``q`` has a rotation x is turned first, by its ``dual``. Or a QuantizedMatrix (tokens, cols) in that basis, as
        ``quantize_activations(x, format, rotation=q.rotation.dual)`` makes it: inputs that several weights share are then rounded once. Where ``q`` has ``padding`` x gets as many columns of zeros; a packed x
        was given them.
    q : (rows, cols). As :func:`prepack` gives it, it is read faster.
    activations : how x, turned, is rounded.

        - None: not at all.
        - "mxfp4", "nvfp4", or an Activations such as ``q.activations``: by :func:`quantize_activations`, to codes and scales; a name takes its defaults. NVFP4 without a tensor scale takes 2688 / amax(x T).
        - "int8": each of q's groups of columns by a step of its own, t = fl32(amax / 127), to the whole number nearest to fl32(x / t), ties to even, held within -127 and 127; to zero where t is.
    dtype : "bfloat16" where ``x`` is bfloat16 bits held as uint16.
    out : float32 array of the result's shape.

    Returns
    -------
    (..., rows) float32. A token's answer depends neither on the tokens beside it (but where they decide NVFP4's tensor scale) nor on the number of threads.

    Inputs as they are: twice the values of a group's codes are multiplied with the inputs and added up, the group's sum is multiplied by half its step and added to those of its 128 columns, and these are
    added from left to right: all in float32, the first two by chains of fused multiply-adds (multiplied and added on level v2). The bytes are promised for each ISA level. Within gamma_n sum |x| |w|, n = 40 + ceil(cols / 128), of the exact product of x,
    turned, and ``q.dequantize()``, subnormal inputs included (Higham, Accuracy and Stability, section 3.1), and of what falls below float32's normal range: 2^-150 for each group, and 2^-146 sum |x| where W's
    steps do. Inputs up to 2^119 overflow only where sum |x| |w| over some of the columns does.

    Rounded inputs: inside a group, of the smaller of both formats' sizes, products of codes are added up in whole numbers. Each sum is multiplied by its two scales, and these m = cols / group numbers are added
    in float32 from left to right; tensor scales come last. The same bytes on every ISA level. Within gamma_n sum |b| |w|, n = m + 1 with four bits and m + 3 with eight, of the exact product of b, what x was rounded
    to, and the values of W's codes, both by their scales and tensor scales as they are (``dequantize()`` rounds a step), and 2^-150 of a subnormal result. Steps of MXFP4 and of eight bits that are less than 2^-108 of the largest in their row count as zero, so that nothing overflows before the
    result does; that may add 2^-101 (s sum |b| + t sum |w|), s and t being the largest steps of both rows.

    Raises
    ------
    ValueError : "x has 64 columns; the weight has 96", the first entry of x that is not finite, an unknown name, a packed x in another basis, an x that overflows when it is turned, or an ``out`` that cannot be filled. TypeError : another dtype, no
        QuantizedMatrix, or ``activations`` beside an x that is packed.
    """
    if not isinstance(q, QuantizedMatrix | PrepackedMatrix):
        raise TypeError(f"q is {type(q).__name__}; it must be a QuantizedMatrix or a PrepackedMatrix")
    rows, cols = q.shape
    turn = q.rotation.dual
    if isinstance(x, QuantizedMatrix):
        if activations is not None or dtype is not None:
            raise TypeError("x is a QuantizedMatrix, rounded already; activations and dtype are for arrays")
        if x.rotation != turn and x.rotation.dual != q.rotation:
            raise ValueError(f"x is in the basis of {x.rotation!r}; q, in that of {q.rotation!r}, needs {turn!r}")
        packed, lead = x, x.shape[:1]
    elif (rounding := _as_activations(activations)) is not None:
        lead = np.shape(x)[:-1]
        packed = quantize_activations(
            _padded(x, q), rounding.format, rule=rounding.rule, mx_rule=rounding.mx_rule, tensor_scale=rounding.tensor_scale, rotation=turn, dtype=dtype, threads=threads
        )
    else:
        packed, values = None, as_float32(_padded(x, q), "x", dtype=dtype, threads=threads)
        lead = values.shape[:-1]
    given = values.shape[-1] if packed is None else packed.shape[1] + packed.padding
    if given != cols + q.padding:
        raise ValueError(f"x has {given} columns; the weight has {cols + q.padding}")
    out = as_output(np.empty((*lead, rows), dtype=np.float32) if out is None else out, (*lead, rows))
    to, team = out.reshape(math.prod(lead), rows), as_threads(threads)
    if packed is not None:
        _core.matmul_packed(packed.core_arrays(), q.core_arrays(), to, team)
        return out
    if q.rotation != Identity():
        values = turn.apply(values, threads=threads)
    elif np.may_share_memory(out, values):
        values = values.copy()
    multiply = _core.matmul if activations is None else _core.matmul_int8
    multiply(values.reshape(-1, given), q.core_arrays(), to, team)
    return out


def _padded(x: ArrayLike, q: QuantizedMatrix | PrepackedMatrix) -> ArrayLike:
    """x with the columns of zeros that the weight has; ValueError where its own are not as many as the weight's."""
    if q.padding and (shape := np.shape(x)) and shape[-1] != q.shape[1]:
        raise ValueError(f"x has {shape[-1]} columns; the weight has {q.shape[1]}")
    return pad_columns(x, q.padding) if np.ndim(x) else x


def _as_activations(activations: str | Activations | None) -> Activations | None:
    """Codes and scales that ``activations`` asks for; None where it is None or "int8"."""
    if activations is None or isinstance(activations, Activations):
        return activations
    if not isinstance(activations, str):
        raise TypeError(f"activations is {type(activations).__name__}; it must be None, a name or an Activations")
    return Activations(activations) if choose("activations", activations, (*FORMATS, "int8")) != "int8" else None
