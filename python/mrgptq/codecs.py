"""Matrices to 4-bit blocks: scales by named rules, codes."""

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from .arrays import as_float32, as_scale, as_threads, choose, refuse_nonfinite
from .formats import MX_RULES, SCALE_SEARCHES, block_format, decode_e4m3, decode_e8m0
from .result import LayerReport, QuantizedMatrix
from .rotations import Dense, Identity, Rotation

PackedMatrix = tuple[str, NDArray[np.uint8], NDArray[np.uint8], float]
"""Format, codes, scales and tensor scale, as the core takes a packed matrix."""
Turn = int | NDArray[np.float32]
"""A rotation as the core takes it: the block size of a Hadamard rotation, 0 for none, or the matrix of another."""
HESSIAN_SEARCHES = ("hessian", "hessian_block")
"""As "mse", the errors weighed by the diagonal of H or by the group's block of it."""


def resolve_scales(format: str, scales: str | None, mx_rule: str, *, more: tuple[str, ...] = (), name: str = "scales") -> tuple[str, str]:
    """A scale rule as the core takes it: (search, mx_rule).

    ``scales`` None is "absmax"; a name from ``MX_RULES`` is "absmax" by that rule. For MXFP4 ``mx_rule`` rounds whatever the search found. ``more`` lists further names that the
    caller can serve, ``name`` is the argument's.
    """
    choose("mx_rule", mx_rule, MX_RULES)
    block_format(format)
    known = SCALE_SEARCHES[format] + more + (MX_RULES if format == "mxfp4" else ())
    scales = "absmax" if scales is None else choose(f"{name} for {format}", scales, known)
    if scales == "quest" and mx_rule == "four-thirds":
        raise ValueError(f'{name} is "quest", which makes powers of two; mx_rule is "four-thirds": take another')
    return ("absmax", scales) if scales in MX_RULES else (scales, mx_rule)


def nvfp4_tensor_scale(amax: float) -> float:
    """The NVFP4 divisor 2688 / amax as a float32 number; 1 for amax 0 and where the quotient overflows."""
    largest = np.float32(amax)
    if not (np.isfinite(largest) and largest >= 0):
        raise ValueError(f"amax is {amax!r}; it must be a finite number in float32, 0 or more")
    return float(_core.nvfp4_tensor_scale(float(largest)))


def tensor_scale_for(
    format: str, x: NDArray[np.float32], mx_rule: str = "even", tensor_scale: float | None = None, *, rotation: Rotation | None = None, name: str = "weight", threads: int | None = None
) -> float:
    """The divisor of a matrix: the one given, else 2688 / amax(x T) (NVFP4), or what the MX rule fixes (3 for four-thirds, 1 otherwise). Refuses an x called ``name`` whose amax is not finite."""
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
    matrix = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    amax = _core.amax(matrix, turn_of(rotation), as_threads(threads))
    if not np.isfinite(amax):
        refuse_nonfinite(x, _core.first_nonfinite(matrix, as_threads(threads)), name)
    return nvfp4_tensor_scale(amax)


def turn_of(rotation: Rotation | None) -> Turn:
    """A rotation, or None, for the core."""
    if rotation is not None and not isinstance(rotation, Rotation):
        raise TypeError(f"rotation is {rotation!r}; it must be None or a rotation such as Hadamard(32)")
    return rotation.matrix if isinstance(rotation, Dense) else (None if rotation is None else rotation.block_size) or 0


def absmax_tensor_scale(matrices: Sequence[NDArray[np.float32]], *, rotation: Rotation | None = None, threads: int | None = None) -> float:
    """2688 / amax over all of some (rows, cols) float32 matrices, rotated, so that a zero matrix among them has no say."""
    return nvfp4_tensor_scale(max(_core.amax(matrix, turn_of(rotation), as_threads(threads)) for matrix in matrices))


def alternating_tensor_scale(weights: Sequence[ArrayLike], scales: str = "mse", *, iterations: int = 20, rotation: Rotation | None = None, threads: int | None = None) -> float:
    """The NVFP4 divisor of matrices that share one, fitted in turn with the group scales.

    Starting from 2688 / amax: for the codes and scales of the present divisor the factor with the least Σ (w - ŵ)² is Σ w ŵ / Σ ŵ²; the divisor takes it up, scales and codes are found
    anew, and so on while the error falls. The paper (arXiv 2509.23202, section 4) describes it; its published code keeps 2688 / amax.

    Parameters
    ----------
    weights : matrices (rows, cols) with any rows and cols a multiple of 16. scales : a rule of :func:`quantize` for NVFP4. iterations : at most so many refits.
    rotation : turns the rows first; its block size must divide every cols.

    Returns
    -------
    float : a float32 number.
    """
    search, _ = resolve_scales("nvfp4", scales, "even")
    matrices = [as_float32(weight, "weights", rank=2, threads=threads) for weight in weights]
    if not matrices:
        raise ValueError("weights is empty; at least one matrix is needed")
    for matrix in matrices:
        check_groups(matrix.shape[1], "nvfp4", "weights")
        if rotation is not None:
            rotation.check_columns(matrix.shape[1], "weights")
    turn = turn_of(rotation)

    def fit(divisor: float) -> tuple[float, float]:
        error = dot = square = 0.0
        for matrix in matrices:
            codes, found, _ = _core.quantize("nvfp4", search, "even", False, matrix, turn, divisor, as_threads(threads))
            sums = _core.fit_sums("nvfp4", matrix, turn, codes, found, divisor, as_threads(threads))
            error, dot, square = error + sums[0], dot + sums[1], square + sums[2]
        return error, float(np.float32(divisor * square / dot)) if dot > 0 else divisor

    divisor = absmax_tensor_scale(matrices, rotation=rotation, threads=threads)
    error, following = fit(divisor)
    for _ in range(iterations):
        next_error, after = fit(following)
        if not next_error < error:
            break
        divisor, error, following = following, next_error, after
    return divisor


def check_groups(cols: int, format: str, name: str = "weight") -> None:
    """Raise ValueError unless the format's group size divides ``cols``."""
    group = block_format(format).group_size
    if cols % group:
        raise ValueError(f"{name} has {cols} columns; {format} needs a multiple of {group}")


def weight_error(format: str, weight: NDArray[np.float32], turn: Turn, codes: NDArray[np.uint8], scales: NDArray[np.uint8], divisor: float, *, threads: int | None = None) -> float | None:
    """Σ (w - ŵ)² / Σ w² in float64 over a (rows, cols) float32 matrix, turned, and its packed codes; None where all of W is zero."""
    error, energy = _core.square_sums(format, weight, turn, codes, scales, divisor, as_threads(threads))
    return error / energy if energy else None


class Rounding:
    """An array, called ``name``, and how it is to be rounded, checked and as the core takes it; what is not finite in it is left to the core unless ``finite``."""

    def __init__(
        self,
        x: ArrayLike,
        name: str,
        format: str,
        rule: str | None,
        rule_name: str,
        mx_rule: str,
        tensor_scale: float | None,
        rotation: Rotation | None,
        dtype: str | None,
        threads: int | None,
        *,
        rank: int | None = None,
        finite: bool = False,
        bfloat16_sixth: bool = False,
    ) -> None:
        block_format(format)
        self.format = format
        self.search, self.mx_rule = resolve_scales(format, rule, mx_rule, name=rule_name)
        self.turn = turn_of(rotation)
        self.bfloat16_sixth = bfloat16_sixth
        self.values = as_float32(x, name, rank=rank, dtype=dtype, threads=threads, finite=finite)
        check_groups(self.values.shape[-1], format, name)
        if rotation is not None:
            rotation.check_columns(self.values.shape[-1], name)
        self.matrix = self.values.reshape(-1, self.values.shape[-1])
        self.divisor = tensor_scale_for(format, self.values, self.mx_rule, tensor_scale, rotation=rotation, name=name, threads=threads)

    @property
    def arguments(self) -> tuple[str, str, str, bool, NDArray[np.float32], Turn, float]:
        """Of the core's ``quantize`` and ``round_to_grid``, before those that are their own."""
        return self.format, self.search, self.mx_rule, self.bfloat16_sixth, self.matrix, self.turn, self.divisor


def quantize(
    weight: ArrayLike,
    format: str = "nvfp4",
    *,
    scales: str | None = None,
    mx_rule: str = "even",
    tensor_scale: float | None = None,
    rotation: Rotation | None = None,
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
    scales : how a group's scale s is found; a = largest magnitude of the group.

        - None or "absmax": s = e4m3(a / 6 * tensor_scale) (NVFP4; everyone), or what ``mx_rule`` makes of a (MXFP4).
        - "fpquant_mse": a shrunk by the factor among 1 … 0.208 that leaves the least sum of |error|^2.4, then as absmax (FP-Quant's ``--w_observer mse``).
        - "mse": of the storable scales around absmax (E4M3: 8 steps down to 7 up; powers of two: two either way) the one with the least sum of error², the smaller on a tie
          (ours; ScaleSweep and ModelOpt sweep likewise). Where NVFP4's absmax would vanish the search begins at the smallest scale there is.
        - "four_over_six" (NVFP4): the better by error² of s for a / 6 and for a / 4, where the grid is finer (arXiv 2512.02010).
        - "quest" (MXFP4): 2^floor(log2(σ * 2.92247856 / 6)) with σ the group's standard deviation; clips, and the result has a ``clip_mask`` (Quartet; QuTLASS, which adds 1e-8 to
          the sixth: the same but for σ near 1e-8). σ 0 stores the smallest scale.
        - "floor", "ceil", "even", "four-thirds" (MXFP4): absmax by that rule.
    mx_rule : how MXFP4 rounds to a power of two. "floor" (OCP) may clip: 7.0 comes back as 6.0; "ceil" never clips; "even" is floor but one step up when the
        mantissa is at least 1.75, as compressed-tensors does; "four-thirds" is (4/3) 2^e, which only the fp_quant dialect stores. NVFP4 ignores it.
    tensor_scale : the NVFP4 divisor; None takes 2688 / amax(weight T).
    rotation : turns the rows first, as ``rotation.apply(weight)`` does and with the same bytes, in the same pass over memory; its block size must divide ``cols``.
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
    work = Rounding(weight, "weight", format, scales, "scales", mx_rule, tensor_scale, rotation, dtype, threads, rank=2)
    codes, found, position = _core.quantize(*work.arguments, as_threads(threads))
    values, search, rule, divisor = work.values, work.search, work.mx_rule, work.divisor
    refuse_nonfinite(values, position, "weight")
    error = weight_error(format, values, work.turn, codes, found, divisor, threads=threads)
    report = LayerReport(
        "rounding",
        format,
        values.shape[0],
        values.shape[1],
        scales_name(format, search, rule),
        error,
        scale_offsets=scale_offsets(format, values, work.turn, found, divisor, rule, threads=threads),
        seconds=time.perf_counter() - start,
    )
    mask = clip_mask(format, (rotation or Identity()).apply(values, threads=threads), found, divisor) if search == "quest" else None
    return QuantizedMatrix(format, codes, found, divisor, rotation or Identity(), report=report, clip_mask=mask)


def clip_mask(format: str, x: NDArray[np.float32], scales: NDArray[np.uint8], divisor: float) -> NDArray[np.bool_]:
    """(rows, cols) bool: True where |x| < 6 * step, so that the value was not clipped, as QuTLASS' clip mask has it; ``numpy.packbits(mask, axis=1, bitorder="little")`` gives its bytes."""
    steps = np.repeat(decode_e8m0(scales) if format == "mxfp4" else decode_e4m3(scales), block_format(format).group_size, axis=1) / np.float32(divisor)
    return np.abs(x) < 6 * steps


def scale_offsets(format: str, x: NDArray[np.float32], turn: Turn, scales: NDArray[np.uint8], divisor: float, mx_rule: str, *, threads: int | None = None) -> dict[int, int]:
    """{steps from absmax: groups}: how far the stored scales of a (rows, cols) matrix, turned, lie from what absmax would have stored under the same divisor. Eight E4M3 steps are a factor of two."""
    absmax = _core.find_scales(format, "absmax", mx_rule, x, turn, divisor, None, as_threads(threads))
    counts = np.bincount((scales.astype(np.int16) - absmax + 255).reshape(-1), minlength=511)
    return {int(i) - 255: int(counts[i]) for i in np.flatnonzero(counts)}


def scales_name(format: str, search: str, rule: str) -> str:
    """A resolved scale rule as a person says it: "fpquant_mse, even"."""
    return search if format == "nvfp4" else f"{search}, {rule}"
