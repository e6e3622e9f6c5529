"""Rotations by name, against SciPy and against what defines each family."""

import numpy as np
import pytest
import scipy.fft
import scipy.linalg

import mrgptq as mg
from mrgptq.transforms import TRANSFORMS

X = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
EXACT = 4e-6  # float32 sums of 32 products of numbers of about 1


@pytest.mark.parametrize(("name", "scipys"), [("dct", lambda x: scipy.fft.dct(x, type=2, norm="ortho")), ("dst", lambda x: scipy.fft.dst(x, type=2, norm="ortho"))])
@pytest.mark.parametrize("k", [1, 3, 32])
def test_trigonometric_ones_are_scipys(name, scipys, k):
    np.testing.assert_allclose(mg.transform(name, k).apply(X[:, : 3 * k]), scipys(X[:, : 3 * k].reshape(5, 3, k).astype(np.float64)).reshape(5, -1), atol=EXACT)


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name not in ("identity", "fastfood")])
def test_all_but_fastfood_are_orthogonal(name):
    matrix = mg.transform(name, 32, seed=3).apply(np.eye(32)).astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(32), atol=1e-6)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_products_stay_what_they_are_under_any(name):
    """(x T)(w T^-T)^T = x w^T, and what is turned is turned back."""
    turn = mg.transform(name, 32, seed=1)
    w = np.random.default_rng(2).standard_normal((4, 96)).astype(np.float32)
    bound = 2e-3 if name == "fastfood" else 1e-4  # its condition number is a few hundred
    np.testing.assert_allclose(turn.apply(X) @ turn.dual.apply(w).T, X @ w.T, atol=bound * 10)
    np.testing.assert_allclose(turn.apply_inverse(turn.apply(X)), X, atol=bound)


def test_walsh_functions_come_in_the_order_of_their_sign_changes():
    """Column i changes its sign i times; the set is Hadamard's."""
    matrix = mg.transform("gsr", 64).matrix
    assert [int((np.diff(np.sign(column)) != 0).sum()) for column in matrix.T] == list(range(64))
    assert {tuple(np.sign(column)) for column in matrix.T} == {tuple(column) for column in scipy.linalg.hadamard(64).T}


def test_random_ones_follow_their_seed():
    for name in ("randomized-hadamard", "orthogonal", "fastfood"):
        assert mg.transform(name, 16, seed=5) == mg.transform(name, 16, seed=5) != mg.transform(name, 16, seed=6)
    signs = mg.transform("randomized-hadamard", 16).matrix / (scipy.linalg.hadamard(16) / 4)
    np.testing.assert_allclose(np.abs(signs), 1, rtol=1e-6)
    assert (np.ptp(signs, axis=1) < 1e-6).all() and 0 < (signs[:, 0] < 0).sum() < 16


def test_fastfood_spreads_any_vector_over_columns_of_unit_length():
    matrix = mg.transform("fastfood", 64, seed=2).matrix.astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=0), 1, rtol=1e-6)
    assert np.abs(matrix).max() < 0.5 and np.abs(matrix @ matrix.T - np.eye(64)).max() > 0.05


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("walsh", 16), "name"), (("dct", 0), "block_size is 0"), (("dct", 2.5), "block_size is 2.5"), (("dct", True), "block_size is True"), (("gsr", 12), "block_size is 12; it must be a power of two"), (("hadamard", 1), "power of two")],
)
def test_refusals(arguments, words):
    with pytest.raises(ValueError, match=words):
        mg.transform(*arguments)


def test_orthogonal_ones_are_drawn_uniformly():
    """An entry then has mean 0 and variance 1 / k; of QR without the signs of its R the diagonal leans to one side. Four standard errors over 400 draws."""
    entries = np.array([mg.transform("orthogonal", 4, seed=seed).matrix.diagonal() for seed in range(400)]).ravel()
    assert abs(entries.mean()) < 4 * 0.5 / np.sqrt(entries.size) and abs(entries.var() - 0.25) < 0.05
