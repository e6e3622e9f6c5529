"""Why a rotation helps one format and hurts another: relative errors by Monte Carlo, absolute ones by quadrature, preserved mass (sections 3 and A of arXiv 2509.23202)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..rotations import Rotation
from ..transforms import RANDOM_TRANSFORMS, transform
from .distributions import Analytic, Distribution, Laplace
from .grids import Grid, StudyFormat

Floats = NDArray[np.float64]
_BATCH = 1 << 20  # values drawn at once


@dataclass(frozen=True)
class Mean:
    """A mean over independent groups. value; standard_error."""

    value: float
    standard_error: float

    @classmethod
    def of(cls, values: Floats) -> "Mean":
        """Of (groups,) values; of a single one the standard error is not known, infinite."""
        return cls(float(values.mean()), np.inf) if len(values) < 2 else cls(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))


@dataclass(frozen=True)
class Errors:
    """What rounding to a format loses.

    Attributes
    ----------
    mse : mean over groups of the squared error over the square of the group, Σ err² / Σ x².
    top : mean of err² / x² of the element that was largest before a rotation, its error taken after turning back.
    absolute : mean of err², an element. absolute_top : the same of the element that was largest.
    """

    mse: Mean
    top: Mean
    absolute: Mean
    absolute_top: Mean


def simulate(format: StudyFormat, distribution: Distribution, rotation: Rotation | None = None, *, values: int = 1 << 23, seed: int = 0) -> Errors:
    """Errors by Monte Carlo.

    Parameters
    ----------
    format : StudyFormat. distribution : what groups are drawn from.
    rotation : turns each group before it is rounded, and the error back; its block size divides the group's, or the group's it, and then so many groups are turned together, and count as one draw in standard errors.
    values : how many values are drawn, at least two draws of what is turned together. seed : of the draws; the same one gives formats of one group size the same values.

    Raises
    ------
    ValueError : block and group sizes of which neither divides the other; values below 1.
    """
    if values < 1:
        raise ValueError(f"values is {values}; it must be 1 or more")
    span = format.group_size
    if rotation is not None and rotation.block_size:
        if rotation.block_size % span and span % rotation.block_size:
            raise ValueError(f"rotation has blocks of {rotation.block_size}, format groups of {span}; one must divide the other")
        span = max(span, rotation.block_size)
    rng = np.random.default_rng(seed)
    count = max(2, values // span)
    x = np.concatenate([distribution.sample(min(_BATCH // span + 1, count - first), span, rng) for first in range(0, count, _BATCH // span + 1)])
    turned = x if rotation is None else rotation.apply(x).astype(np.float64)
    tensor_amax = float(np.abs(turned).max())  # a tensor scale is the whole tensor's
    parts = [_draw_errors(format, x[rows], turned[rows], rotation, tensor_amax) for rows in _slices(count, span)]
    return Errors(*(Mean.of(np.concatenate(part)) for part in zip(*parts, strict=True)))


def _slices(count: int, span: int) -> Iterator[slice]:
    size = max(1, _BATCH // span)
    return (slice(first, first + size) for first in range(0, count, size))


def _draw_errors(format: StudyFormat, x: Floats, turned: Floats, rotation: Rotation | None, tensor_amax: float) -> tuple[Floats, Floats, Floats, Floats]:
    """Of each row, which is drawn and turned by itself, the mean over its groups of relative, top, absolute and absolute top error. Groups of zeros have no relative error."""
    error = format.round(turned.reshape(len(x), -1, format.group_size), tensor_amax).reshape(x.shape) - turned
    if rotation is not None:
        error = rotation.apply_inverse(error).astype(np.float64)
    groups, error = (values.reshape(len(x), -1, format.group_size) for values in (x, error))
    largest = np.abs(groups).argmax(-1)[..., None]
    square, lost, top = (groups**2).sum(-1), (error**2).sum(-1), np.take_along_axis(error, largest, -1)[..., 0] ** 2
    live = square > 0
    count = np.maximum(live.sum(-1), 1)
    relative = np.divide(lost, square, out=np.zeros_like(lost), where=live).sum(-1) / count
    relative_top = np.divide(top, np.take_along_axis(groups, largest, -1)[..., 0] ** 2, out=np.zeros_like(top), where=live).sum(-1) / count
    return relative, relative_top, lost.mean(-1) / format.group_size, top.mean(-1)


# ---- What has a closed form


def expected_error(format: StudyFormat, distribution: Analytic, tensor_amax: float = np.inf) -> tuple[float, float]:
    """(E err² of an element, E err² of the group's largest) without a rotation, by one integral over the group's largest magnitude.

    Given that it is a, the others are independent and below a, and their squared error is a sum over the grid's cells of truncated moments. ``tensor_amax`` : what the tensor scale of "e4m3" was made of.

    Raises ValueError for a search, whose scale depends on more than the largest, for "e4m3" without a finite tensor_amax, and for a distribution whose integrals are not known.
    """
    if format.search != "absmax":
        raise ValueError('format searches its scale by "mse"; only scales that follow from the largest value have a closed form')
    if format.scale == "e4m3" and not np.isfinite(tensor_amax):
        raise ValueError("tensor_amax is not given; the scale e4m3 depends on it")
    _check_analytic(distribution)
    a, weights = _largest(distribution, format.group_size)
    step = format.steps(a, tensor_amax)
    top = (format.grid.round(a / step) * step - a) ** 2
    others = _cell_errors(format.grid, step, a, distribution) / distribution.cdf(a)
    each = (top + (format.group_size - 1) * others) / format.group_size
    return float((weights * each).sum()), float((weights * top).sum())


def preserved_mass(grid: Grid, group_size: int, distribution: Analytic) -> float:
    """Lemma 2's share of E x² that is not rounded to zero, the scale being real: E[x²; |x| > δ M] / E x², M the group's largest magnitude and δ half the smallest step over the largest value."""
    _check_analytic(distribution)
    a, weights = _largest(distribution, group_size)
    kept = distribution.moment(2, a) - distribution.moment(2, StudyFormat(grid, group_size, "real").dead_zone * a)
    mass = (a**2 + (group_size - 1) * kept / distribution.cdf(a)) / group_size
    return float((weights * mass).sum() / distribution.moment(2, np.asarray(np.inf)))


def _check_analytic(distribution: Distribution) -> None:
    if not all(hasattr(distribution, name) for name in ("cdf", "tail", "density", "moment")):
        raise ValueError(f"distribution is {distribution.name}; integrals are known of Laplace and Normal, others are drawn by simulate")


def _largest(distribution: Analytic, group_size: int, nodes: int = 20000) -> tuple[Floats, Floats]:
    """Midpoints a of the largest of group_size magnitudes, and their probabilities, which add up to 1."""
    edges = np.linspace(0, 60, nodes + 1)  # standard deviations; a Laplace value is beyond with probability 1e-37
    return (edges[1:] + edges[:-1]) / 2, np.diff(np.exp(float(group_size) * np.log1p(-np.minimum(distribution.tail(edges), 1 - 1e-16))))


def _cell_errors(grid: Grid, step: Floats, a: Floats, distribution: Analytic) -> Floats:
    """E[(|x| - q)²; |x| <= a] for each pair of step and a: over the cell of each value q."""
    values = np.asarray(grid.magnitudes)
    middles = np.concatenate([[0.0], (values[1:] + values[:-1]) / 2, [np.inf]])
    total = np.zeros_like(a)
    for value, low, high in zip(values, middles[:-1], middles[1:], strict=True):
        low_edge, high_edge = np.minimum(low * step, a), np.minimum(high * step, a)
        zeroth, first, second = (distribution.moment(order, high_edge) - distribution.moment(order, low_edge) for order in (0, 1, 2))
        total += second - 2 * value * step * first + (value * step) ** 2 * zeroth
    return total


# ---- By rotation


def simulate_transform(format: StudyFormat, distribution: Distribution, name: str, *, matrices: int = 8, values: int = 1 << 21, seed: int = 0) -> Mean:
    """The relative error under a family of rotations over the group, see :func:`mrgptq.transform`. Of a random family that of ``matrices`` of its matrices, which share the values; the standard error is then of the mean over matrices."""
    if name not in RANDOM_TRANSFORMS:
        return simulate(format, distribution, transform(name, format.group_size), values=values, seed=seed).mse
    means = [simulate(format, distribution, transform(name, format.group_size, seed=seed + i), values=max(1, values // matrices), seed=seed + i).mse.value for i in range(matrices)]
    return Mean.of(np.array(means))


# ---- By group size


@dataclass(frozen=True)
class Crossover:
    """One group size: relative errors without and with a Hadamard over the group."""

    group_size: int
    plain: Mean
    rotated: Mean


def crossover(format: StudyFormat, sizes: Sequence[int] = (4, 8, 16, 32, 64, 128), distribution: Distribution | None = None, *, values: int = 1 << 22, seed: int = 0) -> Iterable[Crossover]:
    """The format's relative error by group size, with and without a Hadamard as large as the group: where the curves cross a rotation begins to pay. Sizes are powers of two from 2 on."""
    from ..rotations import Hadamard

    for size in sizes:
        sized = replace(format, group_size=size)
        plain, rotated = (simulate(sized, distribution or Laplace(), rotation, values=values, seed=seed).mse for rotation in (None, Hadamard(size)))
        yield Crossover(size, plain, rotated)
