"""MR-GPTQ by the steps of FP-Quant, in NumPy with SciPy's LAPACK and in torch: what the core is measured against.

The inverse of the damped H, its upper Cholesky factor, 128 columns at a time: each column is rounded and its error fed to the rest of the block, then a GEMM feeds the block's errors to
all later columns. float32 throughout, as there; W lies transposed, which makes a column contiguous and is the faster way round.
"""

import numpy as np
from scipy.linalg import blas, lapack

BLOCK = 128


def on_grid(t, steps):
    """The nearest values step * {0, ±0.5, ±1, ±1.5, ±2, ±3, ±4, ±6}, ties to the even code."""
    scaled = np.abs(t / steps)
    spacing = np.where(scaled < 2, np.float32(0.5), np.where(scaled < 4, np.float32(1), np.float32(2)))
    return np.copysign(np.minimum(np.rint(scaled / spacing) * spacing, np.float32(6)), t) * steps


def numpy_mr_gptq(weight, h, steps, damping=0.01):
    """Dequantised weight (rows, cols). weight, steps (rows, cols), h (cols, cols), all float32; steps is each weight's scale."""
    visit = np.argsort(-h.diagonal(), kind="stable")
    r = h[np.ix_(visit, visit)]
    r[np.diag_indices(len(r))] += np.float32(damping * h.diagonal().mean())
    # r is symmetric, so its transpose is r in Fortran's order, which LAPACK can overwrite.
    lower, failed = lapack.spotrf(r.T, lower=1, overwrite_a=1)
    inverse, _ = lapack.spotri(lower, lower=1, overwrite_c=1)
    # The lower triangle read the other way round is the upper one of the same symmetric matrix.
    upper, failed_too = lapack.spotrf(np.asfortranarray(inverse.T), lower=0, overwrite_a=1)
    if failed or failed_too:
        raise SystemExit("the peer's factorisation failed")
    t, s = np.ascontiguousarray(weight.T[visit]), np.ascontiguousarray(steps.T[visit])
    q = np.empty_like(t)
    for begin in range(0, len(t), BLOCK):
        block, errors = t[begin : begin + BLOCK], np.empty_like(t[begin : begin + BLOCK])
        u = upper[begin : begin + BLOCK, begin : begin + BLOCK]
        for i in range(len(block)):
            q[begin + i] = on_grid(block[i], s[begin + i])
            errors[i] = (block[i] - q[begin + i]) / u[i, i]
            block[i + 1 :] -= np.outer(u[i, i + 1 :], errors[i])
        t[begin + BLOCK :] -= upper[begin : begin + BLOCK, begin + BLOCK :].T @ errors
    out = np.empty_like(weight)
    out[:, visit] = q.T
    return out


def torch_mr_gptq(weight, h, steps, damping=0.01):
    """The same in torch, float32 on the CPU, as FP-Quant itself writes it."""
    import torch

    h, weight, steps = (torch.from_numpy(array) for array in (h, weight, steps))
    visit = torch.argsort(-h.diagonal(), stable=True)
    r = h[visit][:, visit]
    r.diagonal().add_(damping * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(r)), upper=True)
    t, s = weight.T[visit].contiguous(), steps.T[visit].contiguous()
    q = torch.empty_like(t)
    for begin in range(0, len(t), BLOCK):
        block = t[begin : begin + BLOCK]
        errors, u = torch.empty_like(block), upper[begin : begin + BLOCK, begin : begin + BLOCK]
        for i in range(len(block)):
            scaled = (block[i] / s[begin + i]).abs_()
            spacing = torch.where(scaled < 2, 0.5, torch.where(scaled < 4, 1.0, 2.0))
            q[begin + i] = torch.copysign((scaled / spacing).round_().mul_(spacing).clamp_(max=6), block[i]) * s[begin + i]
            errors[i] = (block[i] - q[begin + i]) / u[i, i]
            block[i + 1 :].addr_(u[i, i + 1 :], errors[i], alpha=-1)
        t[begin + BLOCK :].addmm_(upper[begin : begin + BLOCK, begin + BLOCK :].T, errors, alpha=-1)
    out = torch.empty_like(weight)
    out[:, visit] = q.T
    return out.numpy()


def ssyrk(x, into):
    """into += x^T x on one triangle, by OpenBLAS; into (cols, cols) float32 in Fortran's order."""
    return blas.ssyrk(1.0, x.T, beta=1.0, c=into, overwrite_c=1, lower=1)
