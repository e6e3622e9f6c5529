"""What values are drawn from in the study: unit variance, so that a rotation leaves their scale as it is."""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..arrays import as_float32

Floats = NDArray[np.float64]


class Distribution(Protocol):
    """Independent values of mean 0 and variance 1, or those of a tensor."""

    @property
    def name(self) -> str:
        """For tables."""

    def sample(self, groups: int, group_size: int, rng: np.random.Generator) -> Floats:
        """(groups, group_size) float64."""


class Analytic(Distribution, Protocol):
    """One whose integrals are known: of a symmetric density p on x >= 0."""

    def cdf(self, t: Floats) -> Floats:
        """P(|x| <= t)."""

    def tail(self, t: Floats) -> Floats:
        """P(|x| > t), to as many digits where it is tiny."""

    def density(self, t: Floats) -> Floats:
        """Of |x|."""

    def moment(self, order: int, t: Floats) -> Floats:
        """E[|x|^order; |x| <= t], order 0, 1 or 2."""


@dataclass(frozen=True)
class Laplace:
    """Density exp(-sqrt(2) |x|) / sqrt(2): the paper's model of weights as they are."""

    name: str = "Laplace"

    def sample(self, groups: int, group_size: int, rng: np.random.Generator) -> Floats:
        """(groups, group_size) float64."""
        return rng.laplace(0, math.sqrt(0.5), (groups, group_size))

    def cdf(self, t: Floats) -> Floats:
        """P(|x| <= t)."""
        return self.moment(0, t)

    def tail(self, t: Floats) -> Floats:
        """P(|x| > t)."""
        return np.exp(-math.sqrt(2) * t)

    def density(self, t: Floats) -> Floats:
        """Of |x|."""
        return math.sqrt(2) * np.exp(-math.sqrt(2) * t)

    def moment(self, order: int, t: Floats) -> Floats:
        """E[|x|^order; |x| <= t]."""
        u = np.minimum(math.sqrt(2) * np.asarray(t, dtype=np.float64), 700.0)  # beyond, nothing is left, and infinity times nothing is no number
        tail = {0: 1.0, 1: 1 + u, 2: 2 + 2 * u + u * u}[order]
        return (math.factorial(order) - tail * np.exp(-u)) / math.sqrt(2) ** order


@dataclass(frozen=True)
class Normal:
    """The paper's model of rotated weights."""

    name: str = "Normal"

    def sample(self, groups: int, group_size: int, rng: np.random.Generator) -> Floats:
        """(groups, group_size) float64."""
        return rng.standard_normal((groups, group_size))

    def cdf(self, t: Floats) -> Floats:
        """P(|x| <= t)."""
        return np.vectorize(math.erf, otypes=[np.float64])(np.asarray(t) / math.sqrt(2))

    def tail(self, t: Floats) -> Floats:
        """P(|x| > t)."""
        return np.vectorize(math.erfc, otypes=[np.float64])(np.asarray(t) / math.sqrt(2))

    def density(self, t: Floats) -> Floats:
        """Of |x|."""
        return math.sqrt(2 / math.pi) * np.exp(-np.square(t) / 2)

    def moment(self, order: int, t: Floats) -> Floats:
        """E[|x|^order; |x| <= t]."""
        t = np.minimum(np.asarray(t, dtype=np.float64), 38.0)  # beyond, nothing is left, and infinity times nothing is no number
        if order == 1:
            return self.density(np.zeros_like(t)) - self.density(t)
        return self.cdf(t) - (t * self.density(t) if order == 2 else 0.0)


@dataclass(frozen=True)
class StudentT:
    """Student's t with more than two degrees of freedom, scaled to unit variance: heavier tails than Laplace's."""

    degrees: float

    def __post_init__(self) -> None:
        if not self.degrees > 2:
            raise ValueError(f"degrees is {self.degrees}; a variance needs more than 2")

    @property
    def name(self) -> str:
        """With its degrees."""
        return f"Student t, {self.degrees:g}"

    def sample(self, groups: int, group_size: int, rng: np.random.Generator) -> Floats:
        """(groups, group_size) float64."""
        return rng.standard_t(self.degrees, (groups, group_size)) * math.sqrt((self.degrees - 2) / self.degrees)


class Empirical:
    """The groups of a tensor's rows, drawn with replacement.

    Parameters
    ----------
    tensor : (..., cols) array, dtypes as in ``quantize``, finite, not all zero. name : for tables.
    """

    def __init__(self, tensor: ArrayLike, name: str = "tensor") -> None:
        values = as_float32(tensor, "tensor").astype(np.float64)
        self._rows = values.reshape(-1, values.shape[-1])
        if not self._rows.any():
            raise ValueError("tensor is zero; it has no relative error")
        self.name = name

    def sample(self, groups: int, group_size: int, rng: np.random.Generator) -> Floats:
        """(groups, group_size) float64; ValueError where the rows have no such group."""
        whole = self._rows.shape[1] // group_size
        if not whole:
            raise ValueError(f"tensor has {self._rows.shape[1]} columns; a group has {group_size}")
        pool = self._rows[:, : whole * group_size].reshape(-1, group_size)
        pool = pool[pool.any(-1)]  # a group of zeros has no relative error
        if not len(pool):
            raise ValueError(f"tensor has no group of {group_size} columns that is not zero")
        return pool[rng.integers(0, len(pool), groups)]
