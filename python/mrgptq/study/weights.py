"""What a model's own weights lose in each format, with and without a Hadamard over the group: every group of every layer, no draws."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..arrays import as_float32
from ..checkpoint.reader import CheckpointReader
from ..checkpoint.safetensors import shown
from ..codecs import quantize
from ..plan import original_layers
from ..rotations import Hadamard
from .grids import FORMATS

KEYS = ("mxfp4", "nvfp4", "int4")
"""What weights are measured in: the FP4 formats by the core, INT4 by NumPy."""
_BATCH = 1 << 20  # values in float64 at once


@dataclass(frozen=True)
class WeightRow:
    """A layer: mean kurtosis of its groups of 32, each over its own mean square (``findings.GROUP_KURTOSIS`` says what Normal and Laplace values have), and relative errors by format's name without and with a Hadamard over the group, the mean over its groups of Σ err² / Σ x²."""

    name: str
    kurtosis: float
    plain: dict[str, float]
    rotated: dict[str, float]


def measurable(model: str | os.PathLike[str]) -> tuple[list[str], dict[str, str]]:
    """A checkpoint's linear layers, and {layer: why not} of those that cannot be measured: groups of 32 do not divide their columns. Raises what the plan of a run does, and ValueError where there are none of the former."""
    cols = {name: shape[1] for name, shape in original_layers(model)[1].items()}
    names = [name for name in cols if cols[name] % 32 == 0]
    if not names:
        first = next(iter(cols))
        raise ValueError(f"{model}: groups of 32 divide the columns of no linear layer; {shown(first)} has {cols[first]}")
    return names, {name: "groups of 32 do not divide its columns" for name in cols if cols[name] % 32}


def weight_rows(model: str | os.PathLike[str], names: Sequence[str] | None = None, *, threads: int | None = None) -> Iterator[WeightRow | None]:
    """Measure a model's layers, one at a time in memory.

    Parameters
    ----------
    model : folder of a checkpoint. names : of its layers; None for those of :func:`measurable`. threads : the core's.

    Yields
    ------
    WeightRow of each name, in their order; None for a layer of zeros, which has no relative error.

    Raises
    ------
    ValueError : a weight that is not finite, by name and place.
    """
    reader = CheckpointReader(model)
    for name in measurable(model)[0] if names is None else names:
        weight = as_float32(reader.tensor(f"{name}.weight"), f"{name}.weight", threads=threads)
        turned = {size: Hadamard(size).apply(weight, threads=threads) for size in {FORMATS[key].group_size for key in KEYS}}
        cases = [{key: _relative_error(values[FORMATS[key].group_size], key, threads) for key in KEYS} for values in (dict.fromkeys(turned, weight), turned)]
        yield WeightRow(name, _kurtosis(weight), *cases) if weight.any() else None


def _relative_error(x: NDArray[np.float32], key: str, threads: int | None) -> float:
    """Groups of zeros are left out."""
    format = FORMATS[key]
    restored = None if key == "int4" else quantize(x, key, threads=threads).dequantize(threads=threads)
    total, count = 0.0, 0
    for rows, groups in _groups(x, format.group_size):
        live = groups.any(-1)
        values = format.round(groups) if restored is None else restored[rows].reshape(groups.shape)
        total += (((values - groups) ** 2).sum(-1)[live] / (groups**2).sum(-1)[live]).sum()
        count += live.sum()
    return float(total / max(count, 1))


def _kurtosis(x: NDArray[np.float32]) -> float:
    total, count = 0.0, 0
    for _, groups in _groups(x, 32):
        groups = groups[groups.any(-1)]
        total += ((groups**4).mean(-1) / (groups**2).mean(-1) ** 2).sum()
        count += len(groups)
    return float(total / max(count, 1))


def _groups(x: NDArray[np.float32], size: int) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Some rows at a time, their groups in float64."""
    step = max(1, _BATCH // x.shape[1])
    for first in range(0, len(x), step):
        rows = slice(first, first + step)
        yield rows, x[rows].astype(np.float64).reshape(-1, size)


def rotation_gain(rows: Sequence[WeightRow], key: str) -> float:
    """Geometric mean over layers of the error without a Hadamard over that with one: above 1 it helps. Layers that lose nothing either way are left out."""
    ratios = [row.plain[key] / row.rotated[key] for row in rows if row.plain[key] > 0 and row.rotated[key] > 0]
    return float(np.exp(np.mean(np.log(ratios)))) if ratios else 1.0
