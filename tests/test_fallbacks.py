"""What GPTQ does where it cannot do what was asked: damping raised, dead columns and plain rounding, each legal and each recorded."""

from dataclasses import replace

import numpy as np
import pytest

import mrgptq as mg
from mrgptq import reference

FORMATS = ["nvfp4", "mxfp4"]
ROTATIONS = [None, 16, 64]


def weight(seed=0, rows=20, cols=64):
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def inputs(tokens, cols=64, seed=1):
    return np.random.default_rng(seed).standard_normal((tokens, cols)).astype(np.float32)


def second_moment(x):
    return x.astype(np.float64).T @ x / len(x)


def with_lowest_eigenvalue(lowest, cols=64):
    """A symmetric matrix whose eigenvalues are 1 but for one, and whose diagonal is positive all the same: that one's eigenvector is spread over all columns."""
    rng = np.random.default_rng(3)
    v = rng.choice([-1, 1], cols) * rng.uniform(0.8, 1.2, cols)
    h = np.eye(cols) + (lowest - 1) / (v @ v) * np.outer(v, v)
    assert h.diagonal().min() > 0
    return h


def rounded_codes(w, format, rotation=None):
    return mg.quantize(w if rotation is None else mg.Hadamard(rotation).apply(w), format).codes


def assert_is_the_reference(q, w, h):
    """Codes, damping and method of reference.py in float64, which has its own ladder and its own dead columns."""
    codes, _, _, _, used = reference.quantize_layer(w, h, q.format, q.rotation.block_size, order=q.recipe.order, damping=q.recipe.damping)
    assert np.array_equal(mg.unpack(q.codes), codes)
    assert used == (q.report.damping if q.report.method == "gptq" else None)


# ---- The ladder


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize(
    ("lowest", "asked", "used"),
    [
        (0.1, 0.01, 0.01), (-0.05, 0.01, 0.1), (-0.5, 0.01, 1.0), (-0.005, 0.0, 0.01), (-0.05, 0.0, 0.1), (-0.5, 0.0, 1.0), (-0.05, 0.02, 0.2), (-0.5, 0.3, None), (-0.5, 2.0, 2.0),
        (-5, 0.01, None), (-5, 5.0, None), (-0.5, np.nextafter(0.1, 1), 1.0),  # ten times that is an ulp above 1 and counts as 1
    ],  # fmt: skip
)
def test_damping_rises_tenfold_until_the_smallest_eigenvalue_is_lifted(lowest, asked, used, rotation):
    """One eigenvalue is `lowest`, 63 are 1: the mean of the diagonal, which no rotation changes, is close to 1, so damping d makes H + d I positive from d > -lowest / mean on."""
    h, w = with_lowest_eigenvalue(lowest), weight()
    mean = (63 + lowest) / 64
    rungs = [asked or 0.01] if asked or lowest >= 0 else [0.0, 0.01]
    while rungs[-1] * 10 <= 1 + 1e-9:
        rungs.append(rungs[-1] * 10)
    assert used == next((pytest.approx(d) for d in rungs if lowest + d * mean > 0), None)  # as the eigenvalue asks
    q = mg.quantize_layer(w, h, mg.Recipe(rotation=rotation, damping=asked, scales="absmax", precision="float64"))
    assert q.report.damping_asked == asked
    if used is None:
        assert q.report.method == "rounding" and q.report.damping == pytest.approx(rungs[-1], rel=1e-12)
        assert q.report.fallback == f"rounded plainly: the Hessian could not be factorised, not even with damping {rungs[-1]:g}"
        assert np.array_equal(q.codes, rounded_codes(w, "nvfp4", rotation))
    else:
        assert (q.report.method, q.report.fallback) == ("gptq", None)
        assert q.report.damping == pytest.approx(used, rel=1e-12)
        assert not np.array_equal(q.codes, rounded_codes(w, "nvfp4", rotation))
    assert_is_the_reference(q, w, h)


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_singular_hessian_is_legal_and_recorded(format, rotation, damping):
    """Ten tokens for 64 columns: without damping the factor's pivots vanish after the tenth, so the first rung is used and said; with it nothing needs saying."""
    w, h = weight(2), second_moment(inputs(10))
    q = mg.quantize_layer(w, h, mg.Recipe(format, rotation=rotation, damping=damping, scales="absmax", precision="float64"))
    assert (q.report.method, q.report.damping, q.report.damping_asked, q.report.dead_columns, q.report.fallback) == ("gptq", 0.01, damping, 0, None)
    assert q.report.relative_error < mg.quantize_layer(w, h, mg.Recipe(format, rotation=rotation, solver="rtn", scales="absmax")).report.relative_error
    assert ("asked 0" in repr(q.report)) == (damping == 0)
    assert_is_the_reference(q, w, h)


@pytest.mark.parametrize("source", ["array", "Hessian", "integers"])
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_zero_hessian_is_legal_and_rounds_plainly(source, rotation, damping):
    w = weight(3)
    h = {"array": np.zeros((64, 64)), "Hessian": mg.Hessian(64), "integers": np.zeros((64, 64), dtype=int)}[source]
    q = mg.quantize_layer(w, h, mg.Recipe("mxfp4", rotation=rotation, damping=damping, scales="absmax"))
    assert np.array_equal(q.codes, rounded_codes(w, "mxfp4", rotation))
    assert (q.report.dead_columns, q.report.relative_error, q.report.damping, q.report.fallback) == (64, None, damping, None)
    assert q.report.weight_error > 0
    assert q.report.tokens == (0 if source == "Hessian" else None)


# ---- Dead columns


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("format", FORMATS)
def test_dead_columns_are_rounded_plainly_and_the_others_do_not_feel_them(format, order, damping):
    """A column that no input reaches costs nothing and gets nothing: its codes are rounding's. What the live ones do equals GPTQ on a layer without it, the scales being given."""
    w, x = weight(4), inputs(300)
    dead = [0, 5, 6, 31, 40, 63]
    x[:, dead] = 0
    h = second_moment(x)
    q = mg.quantize_layer(w, h, mg.Recipe(format, order=order, damping=damping, scales="absmax", precision="float64"))
    codes, steps = mg.unpack(q.codes), np.repeat(reference.steps_of(q.scales, format, q.tensor_scale), reference.GROUP_SIZE[format], axis=1)
    assert q.report.dead_columns == 6 and q.report.damping == damping
    assert np.array_equal(codes[:, dead], mg.unpack(rounded_codes(w, format))[:, dead])
    live = np.setdiff1d(np.arange(64), dead)
    alone = reference.gptq_textbook(w[:, live], h[np.ix_(live, live)], steps[:, live], order, damping)
    assert np.array_equal(codes[:, live], alone)
    assert np.isfinite(q.report.relative_error)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_dead_columns_in_rotated_blocks(format, precision):
    """A whole dead block stays dead under its rotation; columns that are equal within a block leave one live rotated column; a single dead column spreads over its block and is none."""
    w, x = weight(5, cols=128), inputs(400, 128)
    x[:, 0:32] = 0  # a dead block
    x[:, 32:64] = x[:, 32:33]  # one rotated column carries it all, 31 vanish exactly: sums of ± one number
    x[:, 70] = 0  # one dead column among 32
    h = second_moment(x)
    recipe = mg.Recipe(format, rotation=32, scales="absmax", precision=precision, damping=0.0)
    factor = mg.make_factor(h, recipe)
    expected_dead = set(range(32)) | set(range(33, 64))
    assert set(np.flatnonzero(factor.hessian.diagonal() == 0)) == expected_dead
    q = mg.quantize_layer(w, None, recipe, factor=factor)
    assert (q.report.method, q.report.dead_columns, q.report.damping, q.report.fallback) == ("gptq", 63, 0.01, None)  # what is live is singular for the dead one among 32
    columns = sorted(expected_dead)
    assert np.array_equal(mg.unpack(q.codes)[:, columns], mg.unpack(rounded_codes(w, format, 32))[:, columns])
    plain = mg.quantize_layer(w, h, replace(recipe, solver="rtn"))
    assert plain.report.dead_columns == 63 and q.report.relative_error < plain.report.relative_error


@pytest.mark.parametrize("rotation", [16, 64])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_inputs_that_sum_to_zero_are_legal_under_a_rotation(rotation, precision):
    """What a LayerNorm without weights gives: every block of columns sums to zero, so one rotated column vanishes but for rounding, which may leave its diagonal just below zero."""
    w = weight(6)
    lowest = []
    for seed in range(20):
        x = inputs(512, seed=seed).reshape(512, -1, rotation)
        h = mg.Hessian(64)
        h.update((x - x.mean(-1, keepdims=True)).reshape(512, 64))
        recipe = mg.Recipe(rotation=rotation, scales="absmax", precision=precision)
        lowest.append(mg.make_factor(h, recipe).hessian.diagonal().min())
        q = mg.quantize_layer(w, h, recipe)
        assert (q.report.method, q.report.damping, q.report.fallback) == ("gptq", 0.01, None)
        assert q.report.relative_error < mg.quantize_layer(w, h, replace(recipe, solver="rtn")).report.relative_error
        if precision == "float64":
            assert_is_the_reference(q, w, h.matrix)
    assert min(lowest) < 0  # it did happen


def test_off_diagonal_entries_of_a_dead_column_are_cut_out():
    """No second moment has them, but a caller's matrix may: they reach no code."""
    w, h = weight(7), second_moment(inputs(200))
    h[9], h[:, 9] = 0, 0
    odd = h.copy()
    odd[9, 3] = odd[3, 9] = 0.5
    for order in ("natural", "activation"):
        a, b = (mg.quantize_layer(w, m, mg.Recipe(order=order)) for m in (h, odd))
        assert np.array_equal(a.codes, b.codes) and a.report.dead_columns == b.report.dead_columns == 1
