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
        assert q.report.fallback == f"rounded plainly, scales by absmax: the Hessian could not be factorised, not even with damping {rungs[-1]:g}"
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
    searched = mg.quantize_layer(w, h, mg.Recipe("mxfp4", rotation=rotation, damping=damping, scales="gptq", order="group", rounds=3))
    nearest = mg.quantize_layer(w, None, mg.Recipe("mxfp4", rotation=rotation, scales="mse", solver="rtn"))  # every column weighs alike
    assert np.array_equal(searched.codes, nearest.codes) and np.array_equal(searched.scales, nearest.scales)
    # A Hessian knows that no token made it; a matrix of zeros may be of inputs that were.
    fallback = "rounded plainly, scales by absmax: no token reached its inputs" if source == "Hessian" else None
    assert (q.report.dead_columns, q.report.relative_error, q.report.damping, q.report.fallback) == (64, None, damping, fallback)
    assert q.report.weight_error > 0
    assert q.report.tokens == (0 if source == "Hessian" else None)


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("scales", "instead"), [("gptq", "mse"), ("mse", "mse"), ("fpquant_mse", "fpquant_mse"), ("absmax", "absmax"), ("hessian", "hessian"), ("hessian_block", "hessian_block")])
def test_plain_rounding_says_which_scales_it_used(scales, instead, format, rotation):
    """Where no factor can be had there is no GPTQ to choose scales in, nor a loss to refine: their counterpart without a Hessian is mse. A rule that weighs errors still has its weights."""
    rotation = None if (format, rotation) == ("mxfp4", 16) else rotation
    w, h = weight(8), with_lowest_eigenvalue(-5)
    recipe = mg.Recipe(format, rotation=rotation, scales=scales, order="group", rounds=2)
    q = mg.quantize_layer(w, h, recipe)
    assert (q.report.method, q.report.rounds, q.report.damped_errors) == ("rounding", 0, ())
    assert q.report.fallback == f"rounded plainly, scales by {instead}: the Hessian could not be factorised, not even with damping 1"
    plain = mg.quantize_layer(w, h, mg.Recipe(format, rotation=rotation, scales=instead, solver="rtn"))
    assert np.array_equal(q.codes, plain.codes) and np.array_equal(q.scales, plain.scales) and q.tensor_scale == plain.tensor_scale
    assert q.report.scale_offsets == plain.report.scale_offsets and plain.report.fallback is None


@pytest.mark.parametrize("format", FORMATS)
def test_a_target_is_not_moved_where_there_is_no_factor(format):
    w, h = weight(9), with_lowest_eigenvalue(-5)
    recipe = mg.Recipe(format, scales="absmax", cross=1.0)
    q = mg.quantize_layer(w, h, recipe, cross=2 * np.eye(64))
    assert q.report.fallback and q.report.cross == 0 and np.array_equal(q.codes, rounded_codes(w, format))


# ---- Dead columns


@pytest.mark.parametrize("asked", [0.0, 0.001, 0.01, 0.02, 0.05])
@pytest.mark.parametrize("raised", [False, True])
def test_a_dead_column_weighs_the_damping_asked_but_a_hundredth_at_least(asked, raised):
    """The damped loss of a layer whose live columns cost nothing is that of its dead one: (w - q)² times the weight. A damping that had to be raised for the live ones does not count."""
    w, h = weight(10), np.zeros((64, 64))
    h[:48, :48] = with_lowest_eigenvalue(-asked - 0.005 if raised else 1.0, 48)
    w[:, :48] = np.sign(w[:, :48])  # codes 6 and -6 of an absmax scale, without an error
    w[:, 48:] = np.clip(w[:, 48:], -1, 1)
    w[:, 48] = 1
    mean = h.diagonal()[:48].mean()
    q = mg.quantize_layer(w, h, mg.Recipe("nvfp4", scales="absmax", damping=asked), tensor_scale=6.0)
    assert q.report.dead_columns == 16 and q.report.method == "gptq"
    assert (q.report.damping > asked) == raised
    dead_weight, damping = max(asked, 0.01) * mean, q.report.damping * mean
    live = reference.loss(w[:, :48], h[:48, :48] + damping * np.eye(48))
    error = np.square(w.astype(np.float64) - q.dequantize()).sum(0)
    assert not error[:48].any() and error[48:].sum() > 0
    # Sums of 20 * 64² float64 terms.
    assert q.report.damped_errors == pytest.approx((dead_weight * error.sum() / (live + dead_weight * np.square(w[:, 48:].astype(np.float64)).sum()),), rel=1e-11)
    assert reference.damped(h, q.report.damping, asked)[63, 63] == pytest.approx(dead_weight, rel=1e-15)


@pytest.mark.parametrize("raised", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_searched_scales_and_refinement_weigh_dead_columns_as_the_reference_does(format, raised):
    """Where a group holds live and dead columns its scale depends on what the dead ones weigh."""
    w, x = weight(11, rows=70), inputs(300)
    dead = [0, 5, 6, 7, 8, 31, 40, 41, 42, 63]
    x[:, dead] = 0
    h = second_moment(x)
    if raised:
        h -= 1.2 * np.linalg.eigvalsh(h[np.ix_(np.setdiff1d(np.arange(64), dead), np.setdiff1d(np.arange(64), dead))])[0] * np.diag((h.diagonal() != 0).astype(float))
    damping = 0.02
    for rounds in (0, 2):
        q = mg.quantize_layer(w, h, mg.Recipe(format, scales="gptq", order="group", rounds=rounds, damping=damping))
        codes, scales, _, _, used = reference.quantize_layer(w, h, format, None, "gptq", order="group", damping=damping, rounds=rounds)
        assert np.array_equal(q.scales, scales) and np.array_equal(mg.unpack(q.codes), codes)
        assert q.report.damping == used and (used > damping) == raised and q.report.dead_columns == 10
    other = reference.quantize_layer(w, h + np.diag((h.diagonal() == 0) * 100.0), format, None, "gptq", order="group", damping=damping)
    assert not np.array_equal(other[1], reference.quantize_layer(w, h, format, None, "gptq", order="group", damping=damping)[1])  # the weight does count


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("order", ["natural", "activation", "group"])
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
    if order == "group":  # groups without their dead columns are none any more; the order among the live ones is what the core says it is
        visit = [c for c in mg.make_factor(h, q.recipe).order if c not in dead]
        place = np.argsort(visit)
        alone = reference.gptq_textbook(w[:, visit], h[np.ix_(visit, visit)], steps[:, visit], "natural", damping)[:, place]
    else:
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
    """No second moment has them, but what is left of one whose diagonal underflowed may: they reach no code. Column 3 is faint, so that what is allowed would be as much as its own diagonal."""
    w, h = weight(7), second_moment(inputs(200))
    h[9], h[:, 9] = 0, 0
    h[3] *= 10**-2.5
    h[:, 3] *= 10**-2.5
    odd = h.copy()
    odd[9, 3] = odd[3, 9] = 9e-6 * np.abs(h).max()
    assert odd[9, 3] > 0.1 * h[3, 3]
    for recipe in (mg.Recipe(order="natural"), mg.Recipe(order="activation"), mg.Recipe.named("best")):
        a, b = (mg.quantize_layer(w, m, recipe) for m in (h, odd))
        assert np.array_equal(a.codes, b.codes) and a.report.dead_columns == b.report.dead_columns == 1
