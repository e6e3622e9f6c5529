"""Targets shifted to the inputs that a layer will see (``cross``): against reference.py, least squares and the layer's outputs."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.linalg import block_diag, hadamard

import mrgptq as mg
from mrgptq import reference
from searched_problems import FORMATS, errors, form, gamma, searched, weights_of


def seen_inputs(cols, tokens=600, noise=0.3, seed=15):
    """(X, X̃): inputs as they were, and as a quantised model gives them: not independent noise alone, so that cross is not symmetric."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, cols)) @ (np.eye(cols) + 0.3 * rng.standard_normal((cols, cols)))
    seen = x + noise * rng.standard_normal((tokens, cols)) + noise * np.roll(x, 1, axis=1)
    return x, seen


def lost_by_the_stream(seen, rows, seed=23):
    """D, (tokens, rows): in part what the inputs seen could make up for."""
    rng = np.random.default_rng(seed)
    return 0.1 * seen @ rng.standard_normal((seen.shape[1], rows)) + 0.5 * rng.standard_normal((len(seen), rows))


def shifted(w, h, cross, strength, damping=0.01, rotation=None, stream=None):
    """What quantize_layer hands to the solver."""
    factor = mg.Factor(h, rotation=None if rotation is None else mg.Hadamard(rotation), damping=damping)
    turned, moment = (w, cross) if rotation is None else (factor.rotation.apply(w), factor.rotation.apply_both(cross))
    return mg._core.shift_to_inputs(turned, 0, moment, stream, factor.core, strength, 0)


def shift_slack(w, h, cross, damping, strength, stream=0.0):
    """How far two float64 computations of s (W (G - H) + S) (H + λI)^-1 may be apart, by rows. Each solves (R + ΔR) x = gap, |ΔR| <= n γ_{3n+1} |R| in the 2-norm for a Cholesky (Higham, Accuracy and
    Stability, theorem 10.4; LU with pivoting does no worse here, its growth being below n for a positive definite R), and each entry of gap is off by at most γ_{2n+1} (|W| (|G| + |H|) + |S|)."""
    n, u = len(h), 2.0**-53
    r = reference.damped(h, damping)
    eigenvalues = np.linalg.eigvalsh(r)
    gap = w.astype(np.float64) @ (cross - h) + stream
    x = np.linalg.norm(np.linalg.solve(r, gap.T).T, axis=1)
    off = np.linalg.norm(gamma(2 * n + 1, u) * (np.abs(w.astype(np.float64)) @ (np.abs(cross) + np.abs(h)) + np.abs(stream)), axis=1)
    return 2 * strength * (1.1 * n * gamma(3 * n + 1, u) * eigenvalues[-1] / eigenvalues[0] * x + off / eigenvalues[0])[:, None]


@pytest.mark.parametrize(("rows", "cols"), [(1, 16), (65, 160), (130, 288)])
@pytest.mark.parametrize("strength", [0.25, 1.0])
@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_the_shifted_target_is_that_of_the_reference(rows, cols, strength, dead, streamed):
    """Both round one float64 number to float32: half an ulp each, 2^-24 of the result, and the slack of the two solutions."""
    x, seen = seen_inputs(cols)
    w = weights_of("random", rows, cols, 16)
    if dead:
        seen[:, 3::11] = 0
    h, cross = seen.T @ seen / len(seen), x.T @ seen / len(seen)
    h = (h + h.T) / 2
    if dead:
        cross[:, 3::11] = 0.1  # whatever the caller says of them
    stream = weights_of("random", rows, cols, 24) if streamed else None
    added = 0.0 if stream is None else stream.astype(np.float64)
    got, expected = shifted(w, h, cross, strength, stream=stream), reference.shifted_target(w, h, cross, 0.01, strength, added)
    slack = shift_slack(w, h, cross, 0.01, strength, added)
    assert (np.abs(got.astype(np.float64) - expected) <= 2.0**-23 * np.abs(expected) + slack).all()
    assert (slack < 1e-4 * np.linalg.norm(got - w, axis=1, keepdims=True)).all() and np.abs(got - w).max() > 0.01
    if dead:
        assert np.array_equal(got[:, 3::11], w[:, 3::11])


@pytest.mark.parametrize("streamed", [False, True])
def test_without_damping_the_whole_shift_is_the_least_squares_answer(streamed):
    """min over B of |X W^T + D - X̃ B^T|², by LAPACK's least squares on the inputs themselves, whose error is about cond(X̃)² 2^-53 < 1e-11 of the answer; then rounded to float32, as is the
    stream's moment before."""
    x, seen = seen_inputs(64)
    w = weights_of("random", 10, 64, 17)
    lost = lost_by_the_stream(seen, 10) if streamed else np.zeros((len(seen), 10))
    h, stream = seen.T @ seen / len(seen), (lost.T @ seen / len(seen)).astype(np.float32)
    best = np.linalg.lstsq(seen, x @ w.astype(np.float64).T + lost, rcond=None)[0].T
    assert np.linalg.cond(seen) ** 2 * 2.0**-53 < 1e-11
    got = shifted(w, h, x.T @ seen / len(seen), 1.0, damping=0, stream=stream if streamed else None)
    rounded = 2.0**-24 * np.linalg.norm(stream, axis=1, keepdims=True) / np.linalg.eigvalsh(h)[0]
    assert (np.abs(got - best) <= 2.0**-24 * np.abs(best) + 1e-9 * np.abs(best).max(1, keepdims=True) + rounded).all()
    if streamed:
        assert np.abs(got - shifted(w, h, x.T @ seen / len(seen), 1.0, damping=0)).max() > 1000 * rounded.max()


@pytest.mark.parametrize("format", FORMATS)
def test_codes_are_those_of_the_shifted_target(format):
    x, seen = seen_inputs(96)
    w = weights_of("random", 70, 96, 18)
    h, cross = seen.T @ seen / len(seen), x.T @ seen / len(seen)
    for strength in (0.5, 1.0):
        q = mg.quantize_layer(w, h, searched(format, rounds=2, cross=strength), cross=cross)
        target = reference.shifted_target(w, h, cross, 0.01, strength)
        g = reference.tensor_scale(w, format)  # of the weight as it was
        assert q.tensor_scale == g and q.report.cross == strength
        codes, scales, _ = reference.gptq_searched(target, h, format, g)
        codes, scales, losses = reference.refine(target, h, codes, scales, format, g, rounds=2)
        assert np.array_equal(mg.unpack(q.codes), codes) and np.array_equal(q.scales, scales)
        energy = form(target.astype(np.float64), reference.damped(h, 0.01)).sum()
        assert np.allclose(q.report.damped_errors, np.array(losses) / energy, rtol=1e-10, atol=0)
        plain = form(errors(w, q), h).sum() / form(w.astype(np.float64), h).sum()  # against W, not the target
        assert q.report.relative_error == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("rotation", [None, 16])
@pytest.mark.parametrize("solver", ["searched", "static"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("streamed", [False, True])
def test_with_cross_outputs_on_the_inputs_seen_come_nearer_to_the_original_outputs(format, rotation, solver, streamed):
    """|X W^T + D - X̃ Ŵ^T|² on the inputs given and on fresh ones; half the shift goes part of the way."""
    x, seen = seen_inputs(96, tokens=4000)
    given, fresh = slice(0, 3000), slice(3000, 4000)
    w = weights_of("random", 60, 96, 19)
    h, cross = seen[given].T @ seen[given] / 3000, x[given].T @ seen[given] / 3000
    recipe = searched(format, rounds=2, rotation=rotation) if solver == "searched" else mg.Recipe(format, rotation=rotation)
    lost = lost_by_the_stream(seen, 60) if streamed else np.zeros((4000, 60))
    moments = {"cross": cross, "stream": lost[given].T @ seen[given] / 3000 if streamed else None}
    layers = [mg.quantize_layer(w, h, replace(recipe, cross=strength), **(moments if strength else {})) for strength in (0.0, 0.5, 1.0)]
    far, half, near = (layer.dequantize(unrotate=True).astype(np.float64) for layer in layers)
    for part in (given, fresh):
        asked = x[part] @ w.astype(np.float64).T + lost[part]
        losses = [((asked - seen[part] @ values.T) ** 2).sum() for values in (far, half, near)]
        assert losses[2] < losses[1] < losses[0] * 0.9


def test_the_shift_is_the_same_in_every_basis():
    """Rotated weights shifted are shifted weights rotated, by scipy's matrix in float64. float32: log2(16) butterflies and a factor round W by 5 u of a row's norm, which M = I + s (G - H) R^-1
    carries into the target; the two results' own rounding and the target's adds 2 u of it."""
    x, seen = seen_inputs(96)
    w = weights_of("random", 30, 96, 20)
    h, cross = seen.T @ seen / len(seen), x.T @ seen / len(seen)
    h = (h + h.T) / 2
    turn = block_diag(*[hadamard(16)] * 6) / 4
    expected = shifted(w, h, cross, 0.7).astype(np.float64) @ turn
    got = shifted(w, h, cross, 0.7, rotation=16)
    carry = np.linalg.norm(np.eye(96) + 0.7 * np.linalg.solve(reference.damped(h, 0.01), (cross - h).T).T, 2)
    norm = np.linalg.norm(w, axis=1, keepdims=True)
    assert (np.abs(got - expected) <= 2.0**-24 * (5 * carry + 2 * carry) * norm + 1e-11 * norm).all()
    assert np.abs(got - mg.Hadamard(16).apply(w)).max() > 0.01


@pytest.mark.parametrize("streamed", [False, True])
def test_a_rotated_layer_is_the_layer_of_rotated_arguments(streamed):
    """Weight, H, cross and stream turned by the caller and quantised without a rotation: the same bytes."""
    x, seen = seen_inputs(96)
    w = weights_of("random", 30, 96, 20)
    turn = mg.Hadamard(16)
    h = seen.T @ seen / len(seen)
    moments = {"cross": x.T @ seen / len(seen)} | ({"stream": (lost_by_the_stream(seen, 30).T @ seen / len(seen)).astype(np.float32)} if streamed else {})
    recipe = searched("nvfp4", cross=0.7, rounds=2)
    whole = mg.quantize_layer(w, h, replace(recipe, rotation=16), **moments)
    turned = {"cross": turn.apply_both(moments["cross"])} | ({"stream": turn.apply(moments["stream"])} if streamed else {})
    parts = mg.quantize_layer(turn.apply(w), turn.apply_hessian(h), recipe, **turned)
    assert np.array_equal(whole.codes, parts.codes) and np.array_equal(whole.scales, parts.scales) and whole.tensor_scale == parts.tensor_scale
    other = mg.quantize_layer(w, h, replace(recipe, rotation=16), cross=moments["cross"], **({} if streamed else {"stream": np.ones((30, 96), np.float32)}))
    assert not np.array_equal(whole.codes, other.codes)  # the stream decides some of them


def test_cross_is_refused_by_name_where_it_cannot_be_used():
    x, seen = seen_inputs(32)
    w = weights_of("random", 4, 32, 21)
    h, cross = seen.T @ seen / len(seen), x.T @ seen / len(seen)
    recipe = searched("nvfp4", cross=0.5)
    bad = cross.copy()
    bad[4, 7] = np.nan
    for arguments, words in (
        ((replace(recipe, cross=0.0), cross), "cross is given, but the recipe's cross, how far the target moves, is 0"),
        ((recipe, cross[:, :16]), "cross has shape (32, 16); a weight of 32 columns needs (32, 32)"),
        ((recipe, cross[0]), "cross has shape (32,); a weight of 32 columns needs (32, 32)"),
        ((recipe, bad), "cross[4, 7] is not finite"),
        ((recipe, np.where(np.isnan(bad), np.inf, bad)), "cross[4, 7] is not finite"),
        ((mg.Recipe("nvfp4", solver="rtn"), cross), 'cross is given, but the recipe\'s solver is "rtn"; it needs "gptq"'),
    ):
        with pytest.raises(ValueError) as refusal:
            mg.quantize_layer(w, h, arguments[0], cross=arguments[1])
        assert words in str(refusal.value)
    stream = np.ones((4, 32))
    stream[3, 5] = np.inf
    for moments, words in (
        ({"stream": np.ones((4, 32))}, "stream is given without cross"),
        ({"cross": cross, "stream": np.ones((32, 4))}, "stream has shape (32, 4); the weight's is (4, 32)"),
        ({"cross": cross, "stream": stream}, "stream is inf at row 3, column 5"),
        ({"cross": cross * 1e300}, "cross moves the target beyond float32"),
        ({"cross": 3.0}, "cross has shape (); a weight of 32 columns needs (32, 32)"),
    ):
        with pytest.raises(ValueError) as refusal:
            mg.quantize_layer(w, h, recipe, **moments)
        assert words in str(refusal.value)
    for fields, words in (
        ({"cross": 1.5}, "cross is 1.5; it must be from 0 to 1"),
        ({"cross": -0.1}, "cross is -0.1; it must be from 0 to 1"),
        ({"cross": float("nan")}, "cross is nan"),
        ({"cross": 0.5, "solver": "rtn"}, 'cross 0.5 needs the solver "gptq"; the recipe has \'rtn\''),
    ):
        with pytest.raises(ValueError) as refusal:
            mg.Recipe("nvfp4", **fields)
        assert words in str(refusal.value)


def test_cross_changes_nothing_where_h_cannot_be_factorised_and_the_report_says_so():
    h = np.eye(32)
    h[0, 1] = h[1, 0] = 50
    w = weights_of("random", 4, 32, 22)
    q = mg.quantize_layer(w, h, searched("nvfp4", cross=1.0), cross=np.eye(32) * 7)
    assert np.array_equal(q.codes, mg.quantize(w, "nvfp4", scales="mse").codes)
    assert q.report.cross == 0.0 and q.report.fallback is not None
