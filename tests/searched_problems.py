"""Layers, Hessians and sums that the tests of searched scales, refinement and shifted targets share."""

import numpy as np

import mrgptq as mg
from mrgptq import reference

FORMATS = ["nvfp4", "mxfp4"]
PRECISIONS = ["float32", "float64"]
VALUES = np.unique(reference.decode_e2m1(np.arange(16))).astype(np.float64)  # 15 of them


def searched(format, **fields):
    return mg.Recipe(format, **({"scales": "gptq", "order": "group", "precision": "float64"} | fields))


def form(e, r):
    """e R e^T of each row."""
    return np.einsum("ij,ij->i", e @ r, e)


def errors(w, q):
    """W - Ŵ in float64, Ŵ as a reader decodes it."""
    steps = np.repeat(reference.steps_of(q.scales, q.format, q.tensor_scale), reference.GROUP_SIZE[q.format], axis=1)
    return w.astype(np.float64) - (steps * reference.decode_e2m1(mg.unpack(q.codes))).astype(np.float64)


def gamma(n, u):
    return n * u / (1 - n * u)


def weights_of(kind, rows, cols, seed):
    rng = np.random.default_rng(100 + seed)
    if kind == "integers":
        return rng.integers(-12, 13, (rows, cols)).astype(np.float32) / 2
    return (rng.standard_t(4, (rows, cols)) * rng.lognormal(0, 1, (rows, 1))).astype(np.float32)
