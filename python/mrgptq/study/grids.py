"""Block formats for analysis: any element grid, group size and scale type, in NumPy. The formats that the core computes with are among them, and give the core's values."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..arrays import choose

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """A symmetric element grid.

    Attributes
    ----------
    name : str. magnitudes : its values from 0 on, ascending; a value between two goes to the nearer, at a tie to the one of even index.
    """

    name: str
    magnitudes: tuple[float, ...]

    def __post_init__(self) -> None:
        values = np.asarray(self.magnitudes, dtype=np.float64)
        if values.ndim != 1 or len(values) < 2 or values[0] != 0 or not (np.diff(values) > 0).all() or not np.isfinite(values).all():
            raise ValueError(f"magnitudes is {self.magnitudes}; a grid has at least two finite values, ascending from 0")

    @property
    def largest(self) -> float:
        """The largest magnitude, beyond which everything saturates."""
        return self.magnitudes[-1]

    @property
    def exponent(self) -> int:
        """floor(log2(largest)), by which OCP's rule finds a power of two."""
        return int(np.frexp(self.largest)[1]) - 1

    def round(self, x: Floats) -> Floats:
        """The nearest values, float64."""
        values = np.asarray(self.magnitudes, dtype=np.float64)
        if np.array_equal(values, np.arange(len(values))):
            return np.clip(np.rint(x), -self.largest, self.largest)  # the same, ten times as fast
        magnitude, index = np.abs(x), np.zeros(np.shape(x), dtype=np.int64)
        for below, middle in enumerate((values[1:] + values[:-1]) / 2):
            index += magnitude >= middle if below % 2 else magnitude > middle
        return np.copysign(values[index], x)


E2M1 = Grid("e2m1", (0, 0.5, 1, 1.5, 2, 3, 4, 6))
"""What MXFP4 and NVFP4 store."""
INT4 = Grid("int4", tuple(range(8)))
"""Integers from -7 to 7."""


def _real(target: Floats, grid: Grid) -> Floats:
    return target


def _fp16(target: Floats, grid: Grid) -> Floats:
    """The nearest number of float16, which is never 0 or infinite: a group would come back as NaN."""
    with np.errstate(over="ignore"):
        return np.clip(target.astype(np.float16).astype(np.float64), 2.0**-24, 65504)


def _e4m3(target: Floats, grid: Grid) -> Floats:
    from ..formats import decode_e4m3, encode_e4m3

    return decode_e4m3(encode_e4m3(target)).astype(np.float64)


def _power(target: Floats, grid: Grid, exponent: Callable[[Floats, NDArray[np.int_]], NDArray[np.int_]]) -> Floats:
    mantissa, e = np.frexp(target)
    return np.ldexp(1.0, exponent(mantissa * 2, e - 1))


def _floor(target: Floats, grid: Grid) -> Floats:
    """Of amax, by OCP: 2^(floor(log2 amax) - grid.exponent)."""
    return _power(target * grid.largest, grid, lambda mantissa, k: k - grid.exponent)


def _ceil(target: Floats, grid: Grid) -> Floats:
    """The smallest power of two at which nothing clips."""
    return _power(target, grid, lambda mantissa, k: k + (mantissa > 1))


def _even(target: Floats, grid: Grid) -> Floats:
    """As floor, of amax rounded up to the next power of two from 1.75 times one on: to a bit of mantissa, which is E2M1's own."""
    return _power(target * grid.largest, grid, lambda mantissa, k: k - grid.exponent + (mantissa >= 1.75))


def _four_thirds(target: Floats, grid: Grid) -> Floats:
    """(4/3) times the floor's power of two."""
    return 4 / 3 * _floor(target, grid)


SCALES = {"real": _real, "fp16": _fp16, "e4m3": _e4m3, "floor": _floor, "ceil": _ceil, "even": _even, "four-thirds": _four_thirds}
"""How amax / grid.largest becomes a stored scale: not at all; float16; E4M3, under a tensor scale that puts the tensor's largest group at 448; powers of two by four rules."""
SEARCHES = ("absmax", "mse", "four_over_six")


@dataclass(frozen=True)
class StudyFormat:
    """A block format for analysis.

    Attributes
    ----------
    grid : Grid. group_size : values that share a scale. scale : one of ``SCALES``.
    search : "absmax" rounds what puts the group's largest value at the grid's; "mse" takes the stored scale near it under which the group's squared error is least, the smaller at a tie;
        "four_over_six" the better of those that put it at the grid's 6 and at its 4, as the core's rule of that name does for NVFP4.
    """

    grid: Grid
    group_size: int
    scale: str
    search: str = "absmax"

    def __post_init__(self) -> None:
        choose("scale", self.scale, tuple(SCALES))
        choose("search", self.search, SEARCHES)
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, (int, np.integer)) or self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size!r}; it must be an integer from 1 on")
        if self.search == "mse" and self.scale in ("real", "fp16"):
            raise ValueError(f'search is "mse", which tries stored scales one by one; there are too many of scale "{self.scale}"')
        if self.search == "four_over_six" and (self.grid != E2M1 or self.scale != "e4m3"):
            raise ValueError(f'search is "four_over_six", which is for e2m1 with scale "e4m3", as in NVFP4; grid is {self.grid.name}, scale "{self.scale}"')

    @property
    def label(self) -> str:
        """As people call it: "e2m1, 16, e4m3 (absmax)"."""
        return f"{self.grid.name}, groups of {self.group_size}, {self.scale}" + ("" if self.search == "absmax" else f" ({self.search})")

    @property
    def dead_zone(self) -> float:
        """δ of lemma 2: values below δ times the group's largest are rounded to zero, where the scale is real."""
        return self.grid.magnitudes[1] / 2 / self.grid.largest

    def steps(self, amax: Floats, tensor_amax: float) -> Floats:
        """The step of groups with these largest magnitudes, of a tensor with that one; 1 where amax is 0."""
        target = np.where(amax > 0, amax, 1.0) / self.grid.largest
        if self.scale == "e4m3":
            divisor = self.grid.largest * 448 / tensor_amax if tensor_amax > 0 else 1.0
            stored = _e4m3(target * divisor, self.grid)
            return np.where(stored > 0, stored, 0.125) / divisor
        return SCALES[self.scale](target, self.grid)

    def candidates(self, amax: Floats, tensor_amax: float) -> Floats:
        """Steps that a search tries, ascending, on a first axis of their own."""
        if self.search == "four_over_six":
            return np.stack([self.steps(amax, tensor_amax), self.steps(amax * 1.5, tensor_amax)])
        if self.scale != "e4m3":
            return self.steps(amax, tensor_amax) * np.ldexp(1.0, np.arange(-2, 3)).reshape(-1, *(1,) * amax.ndim)
        from ..formats import decode_e4m3, encode_e4m3

        divisor = self.grid.largest * 448 / tensor_amax if tensor_amax > 0 else 1.0
        bits = encode_e4m3(np.where(amax > 0, amax, 1.0) / self.grid.largest * divisor).astype(np.int64)
        near = np.clip(bits + np.arange(-8, 8).reshape(-1, *(1,) * amax.ndim), 1, 126)
        return decode_e4m3(near.astype(np.uint8)).astype(np.float64) / divisor

    def round(self, x: Floats, tensor_amax: float | None = None) -> Floats:
        """The values that are read back of ``x`` (..., groups, group_size), float64. ``tensor_amax``: of the tensor that x is part of; None is x's own."""
        if x.shape[-1] != self.group_size:
            raise ValueError(f"x has shape {x.shape}; its last axis must be a group of {self.group_size}")
        amax = np.abs(x).max(-1)
        whole = float(amax.max(initial=0)) if tensor_amax is None else tensor_amax
        if self.search == "absmax":
            step = self.steps(amax, whole)[..., None]
            return self.grid.round(x / step) * step
        best, least = np.zeros_like(x), np.full(amax.shape, np.inf)
        for step in self.candidates(amax, whole):
            values = self.grid.round(x / step[..., None]) * step[..., None]
            error = ((values - x) ** 2).sum(-1)
            better = error < least
            least[better], best[better] = error[better], values[better]
        return best


FORMATS = {
    "mxfp4": StudyFormat(E2M1, 32, "even"),
    "nvfp4": StudyFormat(E2M1, 16, "e4m3"),
    "int4": StudyFormat(INT4, 32, "fp16"),
    "mxint4": StudyFormat(INT4, 32, "ceil"),
    "nvint4": StudyFormat(INT4, 16, "e4m3"),
}
"""The five that the paper compares."""
