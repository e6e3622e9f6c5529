"""Products with packed weights."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from .arrays import as_float32, as_output, as_threads
from .result import QuantizedMatrix
from .rotations import Identity


def matmul(x: ArrayLike, q: QuantizedMatrix, *, dtype: str | None = None, out: NDArray[np.float32] | None = None, threads: int | None = None) -> NDArray[np.float32]:
    """x W^T for the weight W that ``q`` stands for, in the original basis: what a linear layer answers, W4A16. The weight is read packed, four and a half bits a value.

    Parameters
    ----------
    x : (..., cols) array, dtypes as in :func:`quantize`, finite. Where ``q`` has a rotation x is turned first, by its ``dual``.
    q : (rows, cols).
    dtype : "bfloat16" where ``x`` is bfloat16 bits held as uint16.
    out : float32 array of the result's shape.

    Returns
    -------
    (..., rows) float32. An element is the sum, in float32 and from left to right, of chains of 128 products, each a chain of fused multiply-adds (multiplied and added on level v2). So a token's answer
    depends neither on the tokens beside it nor on the number of threads; it is promised for each ISA level. Within gamma_n sum |x| |w|, n = 128 + ceil(cols / 128), of the exact product of x, turned, and
    ``q.dequantize()``, subnormal numbers included (Higham, Accuracy and Stability, section 3.1).

    Raises
    ------
    ValueError : "x has 64 columns; the weight has 96", the first entry of x that is not finite, or an ``out`` that cannot be filled. TypeError : another dtype, or no QuantizedMatrix.
    """
    if not isinstance(q, QuantizedMatrix):
        raise TypeError(f"q is {type(q).__name__}; it must be a QuantizedMatrix")
    values = as_float32(x, "x", dtype=dtype, threads=threads)
    rows, cols = q.shape
    if values.shape[-1] != cols:
        raise ValueError(f"x has {values.shape[-1]} columns; the weight has {cols}")
    shape = (*values.shape[:-1], rows)
    out = as_output(np.empty(shape, dtype=np.float32) if out is None else out, shape)
    if q.rotation != Identity():
        values = q.rotation.dual.apply(values, threads=threads)
    elif np.may_share_memory(out, values):
        values = values.copy()
    codes, scales = (np.ascontiguousarray(a) for a in (q.codes, q.scales))
    _core.matmul(q.format, values.reshape(-1, cols), codes, scales, q.tensor_scale, out.reshape(-1, rows), as_threads(threads))
    return out
