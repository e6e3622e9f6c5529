"""Rotations by name: the families that the paper and FP-Quant compare, as matrices for :class:`Dense`."""

import numpy as np
from numpy.typing import NDArray

from .arrays import choose
from .rotations import Dense, Hadamard, Identity

TRANSFORMS = ("identity", "hadamard", "randomized-hadamard", "gsr", "dct", "dst", "orthogonal", "fastfood")
"""The names of the families."""
RANDOM_TRANSFORMS = ("randomized-hadamard", "orthogonal", "fastfood")
"""Those of which each seed has its own."""


def transform(name: str, block_size: int, *, seed: int = 0) -> Identity | Hadamard | Dense:
    """A block rotation of one of these families.

    Parameters
    ----------
    name :
        - "identity", "hadamard": as the classes.
        - "randomized-hadamard": D H, D random signs.
        - "gsr": the Walsh matrix, H with its columns in the order of their sign changes (grouped sequency-arranged rotation, arXiv 2505.03810).
        - "dct": the DCT-II, "dst": the DST-II, orthonormal.
        - "orthogonal": uniform among the orthogonal matrices (Mezzadri 2007, arXiv math-ph/0609050).
        - "fastfood": B H P G H S with signs B, a permutation P, Gaussian factors G and S that make every column of unit length (Le et al. 2013): invertible, not orthogonal.
    block_size : columns that are turned together, from 1 on; a power of two from 2 on where H is in it.
    seed : of the random ones.

    Raises
    ------
    ValueError : an unknown name, a block size that the family does not have.
    """
    choose("name", name, TRANSFORMS)
    if isinstance(block_size, bool) or not isinstance(block_size, (int, np.integer)) or block_size < 1:
        raise ValueError(f"block_size is {block_size!r}; it must be an integer from 1 on")
    k, rng = int(block_size), np.random.default_rng(seed)
    if name == "identity":
        return Identity()
    if name == "hadamard":
        return Hadamard(k)
    if name == "randomized-hadamard":
        return Dense(_signs(rng, k)[:, None] * _hadamard(k))
    if name == "gsr":
        h = _hadamard(k)
        return Dense(h[:, np.argsort((np.diff(np.sign(h), axis=0) != 0).sum(0), kind="stable")])
    if name == "dct":
        return Dense(cosines(k))
    if name == "dst":
        return Dense(cosines(k)[:, ::-1] * (-1.0) ** np.arange(k)[:, None])
    if name == "orthogonal":
        q, r = np.linalg.qr(rng.standard_normal((k, k)))
        return Dense(q * np.sign(r.diagonal()))
    h = _hadamard(k)
    matrix = _signs(rng, k)[:, None] * h[:, rng.permutation(k)] * rng.standard_normal(k) @ h
    return Dense(matrix / np.linalg.norm(matrix, axis=0))


def _signs(rng: np.random.Generator, k: int) -> NDArray[np.float64]:
    return rng.choice([-1.0, 1.0], k)


def _hadamard(k: int) -> NDArray[np.float64]:
    return Hadamard(k).matrix.astype(np.float64)


def cosines(k: int) -> NDArray[np.float64]:
    """(k, k) float64, orthogonal: columns are the DCT-II's basis vectors, so that x T is the transform of x."""
    i = np.arange(k)
    matrix = np.sqrt(2 / k) * np.cos(np.pi * np.outer(i + 0.5, i) / k)
    matrix[:, 0] /= np.sqrt(2)
    return matrix
