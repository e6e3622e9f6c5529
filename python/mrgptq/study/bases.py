"""Changes of basis T of the columns that layers with one input share: x W^T = (x T)(W T^-T)^T."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..rotations import Hadamard
from ..transforms import cosines

Floats = NDArray[Any]


class Basis(Protocol):
    """All four take (..., cols) arrays of float32 or float64 and give arrays of the same."""

    def inputs(self, x: Floats) -> Floats:
        """x T."""

    def restore_inputs(self, x: Floats) -> Floats:
        """x T^-1."""

    def weights(self, w: Floats) -> Floats:
        """W T^-T."""

    def restore_weights(self, w: Floats) -> Floats:
        """W T^T."""


def turned_hessian(basis: Basis, hessian: NDArray[np.float64]) -> NDArray[np.float64]:
    """T^T H T of a (cols, cols) second moment, exactly symmetric."""
    turned = basis.inputs(basis.inputs(hessian).T)
    return (turned + turned.T) / 2


class Diagonal:
    """Inputs are divided by positive scales, (cols,) or one for all, and weights multiplied."""

    def __init__(self, scales: NDArray[np.float64]) -> None:
        self.scales = scales

    def inputs(self, x: Floats) -> Floats:
        """x / s."""
        return x / self.scales.astype(x.dtype)

    def restore_inputs(self, x: Floats) -> Floats:
        """x s."""
        return x * self.scales.astype(x.dtype)

    weights, restore_weights = restore_inputs, inputs


UNCHANGED = Diagonal(np.ones(1))
"""No change at all."""


class Kronecker:
    """Every r p columns are multiplied by A ⊗ B: column (i, j) of x, j the fast index, goes to (k, l) by A[i, k] B[j, l].

    Parameters
    ----------
    outer, inner : A (r, r) and B (p, p) float64, orthogonal.
    """

    def __init__(self, outer: NDArray[np.float64], inner: NDArray[np.float64]) -> None:
        self.outer, self.inner = outer, inner

    def inputs(self, x: Floats) -> Floats:
        """x T."""
        return self._times(x, self.outer, self.inner)

    def restore_inputs(self, x: Floats) -> Floats:
        """x T^T."""
        return self._times(x, self.outer.T, self.inner.T)

    weights, restore_weights = inputs, restore_inputs

    @staticmethod
    def _times(x: Floats, outer: NDArray[np.float64], inner: NDArray[np.float64]) -> Floats:
        turned = x.reshape(-1, len(inner)) @ inner.astype(x.dtype)
        if len(outer) > 1:
            turned = outer.T.astype(x.dtype) @ turned.reshape(-1, len(outer), len(inner))
        return turned.reshape(x.shape)


def block_hadamard(block_size: int) -> Kronecker:
    """Sylvester's Hadamard matrix over every ``block_size`` columns, a power of two."""
    return Kronecker(np.eye(1), _sylvester(block_size))


def full_hadamard(cols: int) -> Kronecker:
    """A rotation over all columns at once: Q ⊗ H of a Hadamard matrix H of the largest power of two in ``cols`` and, for the odd rest, the orthonormal DCT-II Q."""
    power = cols & -cols
    return Kronecker(cosines(cols // power), _sylvester(power))


def _sylvester(size: int) -> NDArray[np.float64]:
    return np.ones((1, 1)) if size == 1 else np.sign(Hadamard(size).matrix).astype(np.float64) / np.sqrt(size)


def smoothing(weights: Sequence[Floats], largest: Floats, alpha: float) -> Diagonal:
    """SmoothQuant's scales max|x|^α / max|W|^(1 - α) of each column (Xiao et al. 2022, arXiv 2211.10438), over all weights that share the input. Columns without inputs or weights keep 1.

    weights : (rows, cols) each. largest : (cols,) largest magnitudes of inputs.
    """
    heaviest = np.max([np.abs(w).max(0) for w in weights], axis=0).astype(np.float64)
    alive = (largest > 0) & (heaviest > 0)
    return Diagonal(np.where(alive, largest, 1.0) ** alpha / np.where(alive, heaviest, 1.0) ** (1 - alpha))


def magnified(mean: Floats, alpha: float) -> Diagonal:
    """AWQ's scales: mean|x|^α of each column, divided by the geometric mean of the largest and the smallest of them as its authors do (Lin et al. 2023, arXiv 2306.00978). Columns without inputs keep 1.

    mean : (cols,) mean magnitudes of inputs.
    """
    scales = np.where(mean > 0, mean, 1.0) ** alpha
    live = scales[mean > 0] if (mean > 0).any() else scales
    return Diagonal(np.where(mean > 0, scales / np.sqrt(live.max() * live.min()), 1.0))
