"""Scales searched inside GPTQ and rounds of refinement, against the recursion and the sweeps done by hand."""

from dataclasses import replace

import numpy as np
import pytest

import mrgptq as mg
from mrgptq import reference
from searched_problems import FORMATS, PRECISIONS, VALUES, form, searched, weights_of


def babai(w, h, step, visit):
    """Codes' values by the definition of GPTQ for one row under one step a column: each takes the value that loses least while those after it may follow with real numbers. Solved anew for each."""
    q = np.zeros(len(w))
    for position, c in enumerate(visit):
        seen, free = visit[: position + 1], visit[position + 1 :]
        candidates = np.float32(step) * VALUES.astype(np.float32)
        e = np.vstack([np.repeat((w - q)[visit[:position], None], len(VALUES), 1), w[c] - candidates])  # of the columns seen, by candidate
        pull = h[np.ix_(free, seen)] @ e
        losses = (e * (h[np.ix_(seen, seen)] @ e)).sum(0) - (pull * np.linalg.solve(h[np.ix_(free, free)], pull)).sum(0)
        q[c] = candidates[np.argmin(losses)]
    return q


def sweep(w, q, h, step, visit):
    """Each column in turn takes the value that loses least while all others stand still, every value being tried."""
    q = q.copy()
    candidates = np.float32(step) * VALUES.astype(np.float32)
    for c in visit:
        e = np.tile(w - q, (len(VALUES), 1))
        e[:, c] = w[c] - candidates
        q[c] = candidates[np.argmin(form(e, h))]
    return q


def one_group(format, live, seed, rows=12):
    """A weight of one group, and an H that couples `live` of its columns strongly, the others being independent of all."""
    rng = np.random.default_rng(seed)
    size = reference.GROUP_SIZE[format]
    w = rng.standard_normal((rows, size)).astype(np.float32)
    columns = np.sort(rng.permutation(size)[:live])
    x = rng.standard_normal((3 * live, live)) @ (np.eye(live) + 2 * rng.standard_normal((live, live)))
    h = np.diag(rng.lognormal(0, 1, size))
    h[np.ix_(columns, columns)] = x.T @ x
    return w, h, columns


def steps_near(format, bits, g, below, above):
    """(bits, step) of the storable scales around `bits`, as the formats define them."""
    lowest, highest = (1, 126) if format == "nvfp4" else (0, 252)
    decode = reference.decode_e4m3 if format == "nvfp4" else reference.decode_e8m0
    return [(b, np.float32(decode(b) / np.float32(g))) for b in sorted({min(max(int(bits) + k, lowest), highest) for k in range(-below, above + 1)})]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_the_searched_scale_is_the_one_whose_recursion_done_by_hand_loses_least(format, precision):
    """One group, every storable scale a power of two below absmax and seven eighths above it (MXFP4: two powers each way), codes by solving for what the free columns would be."""
    w, h, _ = one_group(format, 4, 21)
    q = mg.quantize_layer(w, h, searched(format, damping=0, precision=precision))
    visit = np.argsort(-h.diagonal(), kind="stable")
    off_absmax = 0
    for row, values, bits in zip(w.astype(np.float64), q.dequantize(), q.scales[:, 0], strict=True):
        start = mg.quantize(row[None], format, tensor_scale=q.tensor_scale if format == "nvfp4" else None).scales[0, 0]
        tried = []
        for b, step in steps_near(format, start, q.tensor_scale, *((8, 7) if format == "nvfp4" else (2, 2))):
            hand = babai(row, h, step, visit)
            tried.append(((row - hand) @ h @ (row - hand), b, hand))
        tried.sort(key=lambda t: t[0])
        assert tried[1][0] - tried[0][0] > 1e-5 * tried[0][0]  # no tie within float32 rounding of 16 or 32 terms, so the best is one
        assert bits == tried[0][1]
        assert np.array_equal(values, tried[0][2])
        off_absmax += bits != start
    assert off_absmax >= 3


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("scales", ["gptq", "absmax"])
@pytest.mark.parametrize("live", [2, 4])
@pytest.mark.parametrize("format", FORMATS)
def test_refinement_takes_the_best_of_three_scales_by_hand_until_none_is_better(format, live, scales, precision):
    """In one group the values that would be best without a grid are the weights themselves. So a state that stays loses no more than the recursion and a sweep, both by trying every value, at
    its own scale and at both neighbours; and no less than the best of all combinations of codes under those and every scale of the search."""
    w, h, columns = one_group(format, live, 30 + live)
    recipe = searched(format, scales=scales, damping=0, precision=precision, rounds=30)
    first, q = mg.quantize_layer(w, h, replace(recipe, rounds=0)), mg.quantize_layer(w, h, recipe)
    assert q.report.rounds < 30
    visit = np.argsort(-h.diagonal(), kind="stable")
    alone = np.setdiff1d(np.arange(len(h)), columns)
    grid = np.stack(np.meshgrid(*[VALUES] * live, indexing="ij"), -1).reshape(-1, live)
    refined = 0
    for row, values, start, bits, found in zip(w.astype(np.float64), q.dequantize().astype(np.float64), first.dequantize().astype(np.float64), q.scales[:, 0], first.scales[:, 0], strict=True):
        loss, before = form(np.stack([row - values, row - start]), h)
        assert loss <= before * (1 + 1e-5)
        refined += loss < before * (1 - 1e-5)
        for _, step in steps_near(format, bits, q.tensor_scale, 1, 1):
            hand = sweep(row, babai(row, h, step, visit), h, step, visit)
            assert loss <= ((row - hand) @ h @ (row - hand)) * (1 + 1e-5)  # float32 rounding of 16 or 32 terms decides no more than that
        least = np.inf
        for _, step in steps_near(format, found, q.tensor_scale, 16, 16):
            e = row[columns] - (grid * step).astype(np.float32)
            nearest = np.abs(row[alone, None] - (VALUES * step).astype(np.float32)).min(1)
            least = min(least, form(e, h[np.ix_(columns, columns)]).min() + (h.diagonal()[alone] * nearest**2).sum())
        assert loss >= least * (1 - 1e-12)
    assert refined >= 3 or scales == "gptq"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_of_uncoupled_columns_a_refined_group_is_a_local_optimum_of_scale_and_codes(format, precision):
    """A diagonal H: no code's change, and no neighbouring scale with whatever codes, loses less."""
    rng = np.random.default_rng(40)
    w, h = weights_of("random", 20, 64, 40), np.diag(rng.lognormal(0, 1, 64))
    q = mg.quantize_layer(w, h, searched(format, damping=0, precision=precision, rounds=30))
    size = reference.GROUP_SIZE[format]
    for row in range(len(w)):
        for group in range(64 // size):
            here = slice(group * size, (group + 1) * size)
            weight, d = w[row, here].astype(np.float64), h.diagonal()[here]
            loss = (d * (weight - q.dequantize()[row, here]) ** 2).sum()
            for _, step in steps_near(format, q.scales[row, group], q.tensor_scale, 1, 1):
                best = (np.abs(weight[:, None] - (VALUES * step).astype(np.float32)).min(1) ** 2 * d).sum()
                assert best >= loss * (1 - 1e-5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_with_a_diagonal_hessian_searched_scales_are_those_of_the_rule_hessian(format, precision, spread):
    """Nothing is fed back, so the scale sought is that with the least Σ H_cc err_c²; without damping both weigh alike. With equal weights it is the rule mse, exactly."""
    rng = np.random.default_rng(41)
    w = weights_of("random", 66, 160, 41)
    h = np.diag(rng.lognormal(0, spread, 160))
    q = mg.quantize_layer(w, h, searched(format, damping=0, precision=precision))
    plain = mg.quantize_layer(w, h, mg.Recipe(format, scales="hessian", damping=0, order="natural", precision=precision))
    assert np.array_equal(q.scales, plain.scales) and np.array_equal(q.codes, plain.codes)
    assert not np.array_equal(q.scales, mg.quantize(w, format).scales)
    if spread == 0:
        assert np.array_equal(q.scales, mg.quantize(w, format, scales="mse").scales)


@pytest.mark.parametrize("format", FORMATS)
def test_of_equally_good_scales_the_smaller_is_taken(format):
    """Weights 1 and -2 times a step: twice the step has 0.5 and -1. Both lose nothing."""
    size = reference.GROUP_SIZE[format]
    w = np.zeros((2, 64), dtype=np.float32)
    w[:, ::2], w[:, 1::2] = 1, -2
    w[1] *= 0.25
    h = np.eye(64) + 0.25
    for precision in PRECISIONS:
        for rounds in (0, 2):
            q = mg.quantize_layer(w, h, searched(format, damping=0, precision=precision, rounds=rounds), tensor_scale=1.0 if format == "nvfp4" else None)
            assert np.array_equal(q.dequantize(), w) and q.report.damped_errors == (0.0,)
            exact = [b for b in range(0, 127 if format == "nvfp4" else 253) if exactly(2.0, b, format) and exactly(1.0, b, format)]
            start = mg.quantize(w[:1], format, tensor_scale=1.0 if format == "nvfp4" else None).scales[0, 0]
            assert q.scales[0, 0] == min(b for b in exact if abs(b - int(start)) <= (8 if format == "nvfp4" else 2))
    assert q.scales.shape == (2, 64 // size)


def test_equal_values_found_on_two_ways_tie_whatever_rounding_made_of_them():
    """A group that holds no more than 3 steps has the same values at twice the scale. Its recursion and sweep get there through other codes, so rounding differs on the way; in one row the
    reference and the core would each take another of the two if that decided."""
    rng = np.random.default_rng(4)
    w = rng.standard_normal((400, 64)).astype(np.float32)[40:110]
    x = rng.standard_normal((192, 64)) @ (np.eye(64) + 1.5 * rng.standard_normal((64, 64)) / 8)
    h = x.T @ x / len(x)
    codes, scales, _, _, _ = reference.quantize_layer(w, h, "mxfp4", None, "gptq", "four-thirds", rounds=2)
    q = mg.quantize_layer(w, h, searched("mxfp4", mx_rule="four-thirds", rounds=2))
    assert np.array_equal(q.dequantize(), reference.dequantize(codes, scales, "mxfp4", np.float32(3)))
    assert np.array_equal(q.scales, scales) and np.array_equal(mg.unpack(q.codes), codes)


def exactly(value, bits, format):
    step = float((reference.decode_e4m3 if format == "nvfp4" else reference.decode_e8m0)(bits))
    return step > 0 and value / step in VALUES
