"""GPTQ in NumPy over any element grid, with a static activation order: for the formats that the compiled core does not have."""

import numpy as np
from numpy.typing import NDArray

from .grids import Grid

Floats = NDArray[np.float64]
BLOCK = 128
"""Columns between two products."""


def factorise(hessian: Floats, damping: float) -> tuple[NDArray[np.int_], Floats | None]:
    """(columns in reversed visiting order, lower Cholesky factor of the damped Hessian in that order).

    Columns are visited by descending diagonal. λ = damping * mean(live diagonal); a column that no input reached stands alone. A factorisation in which a pivot loses all its digits counts as failed, and damping rises tenfold,
    from 0.01 where it was 0; None where no damping up to 1 helped.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not dead.all() else 1.0
    columns = np.argsort(-diagonal, kind="stable")[::-1]
    while True:
        r = np.where(dead[:, None] | dead, 0.0, hessian)
        np.fill_diagonal(r, np.where(dead, mean, diagonal + damping * mean))
        r = r[np.ix_(columns, columns)]
        try:
            lower = np.linalg.cholesky(r)
        except np.linalg.LinAlgError:
            lower = None
        if lower is not None and (lower.diagonal() ** 2 > len(r) * np.finfo(np.float64).eps * r.diagonal()).all():
            return columns, lower
        damping = 0.01 if damping == 0 else damping * 10
        if damping > 1 + 1e-9:
            return columns, None


def gptq(weight: Floats, hessian: Floats, grid: Grid, steps: Floats, *, damping: float = 0.01) -> Floats:
    """The values that GPTQ gives, (rows, cols) float64; those of plain rounding where the Hessian cannot be factorised.

    Column i gets t = w_i + Σ (w - q)_k L[k, i] / L[i, i] over the columns k before it, rounded (Babai's nearest plane, Chen et al. 2025, arXiv 2507.18553): one product for what comes from other blocks of columns.

    Parameters
    ----------
    weight : (rows, cols). hessian : (cols, cols), symmetric. steps : (rows, cols), what a value of the grid counts where. damping : relative to the mean of the Hessian's live diagonal.
    """
    columns, lower = factorise(hessian, damping)
    if lower is None:
        return grid.round(weight / steps) * steps
    unit = lower / lower.diagonal()
    w, steps = weight[:, columns], steps[:, columns]
    error, rounded = np.zeros(w.shape), np.empty(w.shape)
    for end in range(len(columns), 0, -BLOCK):
        first = max(end - BLOCK, 0)
        fed = w[:, first:end] + error[:, end:] @ unit[end:, first:end]
        for i in range(end - 1, first - 1, -1):
            t = fed[:, i - first] + error[:, i + 1 : end] @ unit[i + 1 : end, i]
            rounded[:, i] = grid.round(t / steps[:, i]) * steps[:, i]
            error[:, i] = w[:, i] - rounded[:, i]
    values = np.empty(w.shape)
    values[:, columns] = rounded
    return values
