"""Matrices to 4-bit blocks and back: scales by named rules, codes, packing."""

import time

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from .arrays import as_float32, as_output, as_scale, as_threads, choose
from .formats import MX_RULES, block_format
from .result import LayerReport, QuantizedMatrix

SCALE_SEARCHES = ("absmax", "fpquant_mse")
"""Which magnitude maps to 6: the group's largest, or one shrunk by up to 0.8 to lessen the sum of |error|^2.4 (FP-Quant's ``--w_observer mse``)."""


def resolve_scales(format: str, scales: str | None, mx_rule: str) -> tuple[str, str]:
    """A scale rule as the core takes it: (search, mx_rule).

    ``scales`` None is "absmax"; a name from ``MX_RULES`` is "absmax" by that rule. For MXFP4 ``mx_rule`` rounds whatever the search found.
    """
    choose("mx_rule", mx_rule, MX_RULES)
    known = SCALE_SEARCHES + (MX_RULES if format == "mxfp4" else ())
    scales = "absmax" if scales is None else choose(f"scales for {format}", scales, known)
    return ("absmax", scales) if scales in MX_RULES else (scales, mx_rule)


def nvfp4_tensor_scale(amax: float) -> float:
    """The NVFP4 divisor 2688 / amax as a float32 number; 1 for amax 0 and where the quotient overflows."""
    largest = np.float32(amax)
    if not (np.isfinite(largest) and largest >= 0):
        raise ValueError(f"amax is {amax!r}; it must be a finite number in float32, 0 or more")
    return float(_core.nvfp4_tensor_scale(float(largest)))


def tensor_scale_for(format: str, x: NDArray[np.float32], mx_rule: str = "even", tensor_scale: float | None = None, *, threads: int | None = None) -> float:
    """The divisor of a matrix: the one given, else 2688 / amax(x) (NVFP4), or what the MX rule fixes (3 for four-thirds, 1 otherwise)."""
    if format == "mxfp4":
        fixed = float(_core.mx_tensor_scale(mx_rule))
        if tensor_scale is not None and as_scale(tensor_scale, "tensor_scale") != fixed:
            raise ValueError(f"tensor_scale is {tensor_scale!r}; mxfp4 by the rule {mx_rule!r} has {fixed:g}")
        return fixed
    if tensor_scale is not None:
        divisor = as_scale(tensor_scale, "tensor_scale")
        with np.errstate(over="ignore"):
            largest = np.float32(6) * (np.float32(448) / np.float32(divisor))
        if not np.isfinite(largest):  # no amax in float32 calls for so small a divisor
            raise ValueError(f"tensor_scale is {tensor_scale!r}; 6 * 448 / tensor_scale, the largest value it could stand for, overflows float32")
        return divisor
    return nvfp4_tensor_scale(_core.amax(x, as_threads(threads)))


def check_groups(cols: int, format: str, name: str = "weight") -> None:
    """Raise ValueError unless the format's group size divides ``cols``."""
    group = block_format(format).group_size
    if cols % group:
        raise ValueError(f"{name} has {cols} columns; {format} needs a multiple of {group}")


def weight_error(weight: NDArray[np.float32], rounded: NDArray[np.float32]) -> float | None:
    """Σ (w - ŵ)² / Σ w² in float64 over two (rows, cols) float32 matrices; None where all of W is zero."""
    energy = float(np.einsum("ij,ij->", weight, weight, dtype=np.float64))
    error = weight - rounded
    return float(np.einsum("ij,ij->", error, error, dtype=np.float64)) / energy if energy else None


def quantize(
    weight: ArrayLike,
    format: str = "nvfp4",
    *,
    scales: str | None = None,
    mx_rule: str = "even",
    tensor_scale: float | None = None,
    dtype: str | None = None,
    threads: int | None = None,
) -> QuantizedMatrix:
    """Round a matrix onto a block-scaled 4-bit grid.

    Each row is cut into groups of consecutive columns (16 in NVFP4, 32 in MXFP4). A group keeps one scale, a column its 4-bit code, and the value read
    back is ``step * e2m1(code)`` with ``step = scale / tensor_scale`` in float32. Elements round to nearest, ties to the even code.

    Parameters
    ----------
    weight : (rows, cols) array, float32 / float16 / bfloat16 / float64, finite; ``cols`` a multiple of the group size; any strides.
    format : "nvfp4" or "mxfp4".
    scales : None or "absmax": the largest magnitude of a group maps to 6 (NVFP4), or what ``mx_rule`` makes of it (MXFP4). "fpquant_mse": a shrunk one that
        gives the least sum of |error|^2.4 over 100 factors 1 … 0.208, then rounded like absmax. For MXFP4 also "floor", "ceil", "even", "four-thirds".
    mx_rule : how MXFP4 rounds to a power of two. "floor" (OCP) may clip: 7.0 comes back as 6.0; "ceil" never clips; "even" is floor but one step up when the
        mantissa is at least 1.75, as compressed-tensors does; "four-thirds" is (4/3) 2^e, which only the fp_quant dialect stores. NVFP4 ignores it.
    tensor_scale : the NVFP4 divisor; None takes 2688 / amax(weight).
    dtype : "bfloat16" where ``weight`` is bfloat16 bits held as uint16.
    threads : None follows OMP_NUM_THREADS.

    Returns
    -------
    QuantizedMatrix : codes (rows, cols / 2) uint8, scales (rows, cols / group_size) uint8, tensor_scale float. Same bytes for any number of threads.

    Raises
    ------
    ValueError : "weight has 100 columns; nvfp4 needs a multiple of 16", or the first non-finite entry with its row and column, or an unknown name. TypeError : another dtype.

    References
    ----------
    OCP Microscaling Formats (MX) v1.0, section 5; Egiazarian et al. 2025 (arXiv 2509.23202), section 4.1.
    """
    start = time.perf_counter()
    block_format(format)
    search, rule = resolve_scales(format, scales, mx_rule)
    values = as_float32(weight, "weight", rank=2, dtype=dtype, threads=threads)
    check_groups(values.shape[1], format)
    divisor = tensor_scale_for(format, values, rule, tensor_scale, threads=threads)
    found = _core.find_scales(format, search, rule, values, divisor, as_threads(threads))
    codes = _core.encode(format, values, found, divisor, as_threads(threads))
    error = weight_error(values, _core.dequantize(format, codes, found, divisor, as_threads(threads)))
    report = LayerReport("rounding", format, values.shape[0], values.shape[1], scales_name(format, search, rule), error, seconds=time.perf_counter() - start)
    return QuantizedMatrix(format, codes, found, divisor, report=report)


def scales_name(format: str, search: str, rule: str) -> str:
    """A resolved scale rule as a person says it: "fpquant_mse, even"."""
    return search if format == "nvfp4" else f"{search}, {rule}"


def round_activations(
    x: ArrayLike,
    format: str,
    *,
    mx_rule: str = "even",
    tensor_scale: float | None = None,
    dtype: str | None = None,
    out: NDArray[np.float32] | None = None,
    threads: int | None = None,
) -> NDArray[np.float32]:
    """The values that a layer with 4-bit inputs computes with: ``x`` rounded to the grid of ``format`` by absmax scales.

    Parameters
    ----------
    x : (..., cols) array, finite, dtypes as in :func:`quantize`. Of a bfloat16 ``x`` amax / 6 is rounded to bfloat16 before it becomes an NVFP4 scale: compressed-tensors
        divides in the input's own dtype, and up to 2.4 % of the scales differ from the float32 rule's.
    tensor_scale : the NVFP4 divisor, calibrated in checkpoints; None takes 2688 / amax(x).
    out : float32 array of x's shape; ``out=x`` rounds in place.

    Returns
    -------
    float32 array of x's shape.
    """
    block_format(format)
    choose("mx_rule", mx_rule, MX_RULES)
    own_dtype = getattr(x, "dtype", None)
    bfloat16 = dtype == "bfloat16" or own_dtype == "BF16" or getattr(own_dtype, "name", None) == "bfloat16"  # "BF16": a StoredTensor's
    values = as_float32(x, "x", dtype=dtype, threads=threads)
    check_groups(values.shape[-1], format, "x")
    matrix = values.reshape(-1, values.shape[-1])
    divisor = tensor_scale_for(format, matrix, mx_rule, tensor_scale, threads=threads)
    in_place = out is x
    out = as_output(np.empty(values.shape, dtype=np.float32) if out is None else out, values)
    if not in_place and np.may_share_memory(out, matrix):
        matrix = matrix.copy()  # a shifted overlap would read what was just written
    _core.round_to_grid(format, "absmax", mx_rule, bfloat16, matrix, divisor, out.reshape(-1, out.shape[-1]), as_threads(threads))
    return out


def _bytes(array: ArrayLike, name: str) -> NDArray[np.uint8]:
    values = np.asarray(array)
    if values.dtype != np.uint8 or values.ndim != 2:
        raise ValueError(f"{name} is {values.dtype} of shape {values.shape}; it must be a uint8 matrix")
    return np.ascontiguousarray(values)


def pack(codes: ArrayLike) -> NDArray[np.uint8]:
    """(rows, cols) codes 0 … 15 to (rows, cols / 2) uint8, the even column in the low nibble."""
    values = _bytes(codes, "codes")
    if values.shape[1] % 2:
        raise ValueError(f"codes has {values.shape[1]} columns; two share a byte")
    if values.size and values.max() > 15:
        raise ValueError(f"codes holds {values.max()}; a code is 0 … 15")
    return _core.pack(values)


def unpack(packed: ArrayLike) -> NDArray[np.uint8]:
    """(rows, cols / 2) uint8 to (rows, cols) codes 0 … 15, the inverse of :func:`pack`."""
    return _core.unpack(_bytes(packed, "packed"))
