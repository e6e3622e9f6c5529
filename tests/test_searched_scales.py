"""Rules that search the storable scales, for weights and activations: by exhaustion, under Hessians, and every rule against reference.py."""

from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

import ml_dtypes
import numpy as np
import pytest

import mrgptq as mg
from mrgptq import _core, reference
from scales_by_hand import AWKWARD, E2M1, FORMATS, LATTICE, lattice, mx_step, nvfp4_bits, squares, with_small_groups

# ---- Searches over storable scales, by exhaustion

SCALE_DTYPES = {"nvfp4": ml_dtypes.float8_e4m3fn, "mxfp4": ml_dtypes.float8_e8m0fnu}
STORABLE = {"nvfp4": np.arange(1, 127, dtype=np.uint8), "mxfp4": np.arange(253, dtype=np.uint8)}  # positive, and 6 * step is finite
IN_RANGE = {"nvfp4": range(-8, 8), "mxfp4": range(-2, 3)}


@lru_cache(maxsize=None)
def mx_bits(a, rule):
    step = mx_step(Fraction(a), rule) * (3 if rule == "four-thirds" else 1)
    return int(np.log2(float(step))) + 127


def absmax_bits(groups, format, rule="even", divisor=1.0):
    """The stored scale that a search starts from: (...) of groups (..., G)."""
    largest = np.abs(groups).max(-1)
    if format == "nvfp4":
        return np.maximum(nvfp4_bits(largest / np.float32(6), divisor), 1)  # 0x01 where absmax's own scale vanishes
    return np.array([mx_bits(float(a), rule) if a else 0 for a in largest.flat], dtype=np.uint8).reshape(largest.shape)


def nearest_errors(groups, steps):
    """float64 |x| - |q|, q the nearest value of the grid by exhaustion, the even code on a tie; steps broadcast against groups (..., G)."""
    magnitude = np.abs(groups.astype(np.float64))
    errors = magnitude + np.zeros_like(steps)
    for code, value in enumerate(map(float, E2M1)):
        other = magnitude - value * steps
        nearer = np.abs(other) < np.abs(errors) if code % 2 else np.abs(other) <= np.abs(errors)
        errors = np.where(nearer, other, errors)
    return errors


def exact_steps(bits, format, rule="even"):
    return bits.view(SCALE_DTYPES[format]).astype(np.float64) / (3 if rule == "four-thirds" else 1)


@pytest.mark.parametrize("name", LATTICE)
@pytest.mark.parametrize(("format", "rule"), [("nvfp4", "even")] + [("mxfp4", rule) for rule in mg.MX_RULES])
def test_mse_is_the_best_of_all_storable_scales(format, rule, name):
    """Inside its range, and no scale outside loses less either.

    Above: to double a step is to leave out values of the grid and to add such from 8 steps on, so it brings no value nearer while amax <= 7 old steps. Half of a scale above the range
    is at least absmax's, whose step has amax < 6.4 steps (or is MXFP4's floor moved up by one), and it is storable where the scale is normal. Below: the step is at most half of NVFP4's
    from absmax, less one E4M3 step, or an eighth of MXFP4's. Then the largest value is clipped by more than 2.25 absmax steps s, which costs over 5 s² (NVFP4: by 2.8, 8 s²), while the
    other values lose at most s²/16 more each under absmax (NVFP4: s²/4 more), and the largest itself s² (floor, where it costs 10 s²: 4 s²): less in sum.
    """
    w = lattice(name, format)
    groups = w.reshape(len(w), -1, FORMATS[format])
    q = mg.quantize(w, format, scales="mse", mx_rule=rule, tensor_scale=1.0 if format == "nvfp4" else None)
    storable = np.arange(254, dtype=np.uint8) if rule == "four-thirds" else STORABLE[format]
    losses = np.square(nearest_errors(groups, exact_steps(storable, format, rule)[:, None, None, None])).sum(-1)
    start = absmax_bits(groups, format, rule)
    steps_away = storable[:, None, None].astype(int) - start
    inside = (steps_away >= IN_RANGE[format].start) & (steps_away < IN_RANGE[format].stop)
    within = np.where(inside, losses, np.inf)
    live = groups.any(-1)
    if rule == "four-thirds":
        # Thirds are no float32 numbers: step, quotient and product are rounded once each, so q, at most 2 |x|, is off by 6.1 * 2^-24 |x| and err², err at most |x|, by twice that times |x|.
        # It counts for the scale taken and for the one passed over.
        slack = 4 * 6.2 * 2.0**-24 * np.square(groups.astype(np.float64)).sum(-1)
        taken = np.take_along_axis(within, q.scales[None].astype(int), 0)[0]
        assert (taken <= within.min(0) + slack)[live].all()
    else:
        slack = 0.0
        assert np.array_equal(q.scales[live], storable[within.argmin(0)][live])  # the first of equals
        tied = (within == within.min(0)).sum(0) > 1
        assert name != "ties" or tied[live].sum() > 20
    normal = live & (start >= 8) if format == "nvfp4" else live
    assert normal.sum() > 100
    assert (np.where(inside, np.inf, losses).min(0) >= within.min(0) - slack)[normal].all()
    assert name == "ties" or (q.scales != start)[live].mean() > 0.01  # else absmax would pass


def searched(w, format, scales, hessian, divisor=1.0):
    """(rows, groups) stored scales of a rule that needs H."""
    recipe = mg.Recipe(format, scales=scales, solver="rtn", order="natural")
    return mg.quantize_layer(w, hessian, recipe, tensor_scale=divisor if format == "nvfp4" else None).scales


def integer_hessian(cols, seed=0):
    """X^T X of small integers: exact, and far from diagonal inside a group."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-2, 3, (32, cols)) + rng.integers(-2, 3, (32, cols // 4)).repeat(4, axis=1)
    return (x.T @ x).astype(np.float64)


@pytest.mark.parametrize("name", LATTICE)
@pytest.mark.parametrize("format", FORMATS)
def test_searches_under_a_hessian_take_the_least_of_their_sums(format, name):
    w = lattice(name, format)
    size = FORMATS[format]
    groups = w.reshape(len(w), -1, size)
    h = integer_hessian(w.shape[1])
    blocks = np.stack([h[i : i + size, i : i + size] for i in range(0, len(h), size)])
    start = absmax_bits(groups, format)
    candidates = np.stack([np.clip(start.astype(int) + offset, STORABLE[format][0], STORABLE[format][-1]) for offset in IN_RANGE[format]]).astype(np.uint8)
    errors = np.sign(groups) * nearest_errors(groups, exact_steps(candidates, format)[..., None])
    # Errors are at most 2^12 of their units (2^-11 to 2^-6, by the group's size), entries of H below 2^10: all sums are exact, so ties are ties.
    sums = {"mse": np.square(errors).sum(-1), "hessian": np.einsum("gii,krgi->krg", blocks, np.square(errors)), "hessian_block": np.einsum("krgi,gij,krgj->krg", errors, blocks, errors)}
    live = groups.any(-1)
    expected = {rule: np.where(live, np.take_along_axis(candidates, s.argmin(0)[None], 0)[0], 0x20 if format == "nvfp4" else 0) for rule, s in sums.items()}
    for rule in ("hessian", "hessian_block"):
        assert np.array_equal(searched(w, format, rule, h), expected[rule])
    if name != "ties":
        assert (expected["hessian"] != expected["mse"]).any() and (expected["hessian_block"] != expected["hessian"]).any()  # the three are three


@pytest.mark.parametrize("format", FORMATS)
def test_a_search_under_a_hessian_ends_where_its_range_ends(format):
    """Groups of one value that says where to begin and hardly counts, and others, which count, that a scale so many steps below represents exactly: it is taken if and only if it is in range."""
    size, lowest = FORMATS[format], IN_RANGE[format].start
    rng = np.random.default_rng(37)
    start = absmax_bits(np.eye(1, size, dtype=np.float32) * 6, format)
    offsets = np.arange(lowest - 3, 1)
    steps = exact_steps((start + offsets).astype(np.uint8), format)
    w = rng.choice([-1, 1], (len(offsets), size)) * np.resize([0.5, 1, 1.5, 2, 3], size) * steps[:, None]  # all of them in every group, so that no other scale is exact
    w[:, 0] = 6
    weights = np.full(size, 2.0**20)
    weights[0] = 1
    candidates = (start + np.array(IN_RANGE[format])[:, None]).astype(np.uint8)
    sums = (weights * np.square(nearest_errors(w, exact_steps(candidates, format)[..., None]))).sum(-1)
    for rule in ("hessian", "hessian_block"):
        found = searched(w.astype(np.float32), format, rule, np.diag(weights))[:, 0]
        assert np.array_equal(found, np.take_along_axis(candidates, sums.argmin(0)[None], 0)[0])
        assert np.array_equal(found == start + offsets, offsets >= lowest)


@pytest.mark.parametrize("format", FORMATS)
def test_what_a_hessian_must_not_change_and_what_it_must(format):
    rng = np.random.default_rng(31)
    w = rng.standard_t(4, (24, 96)).astype(np.float32)
    plain = mg.quantize(w, format, scales="mse")
    divisor = plain.tensor_scale
    for rule in ("hessian", "hessian_block"):
        assert np.array_equal(searched(w, format, rule, np.eye(96), divisor), plain.scales)
        x = rng.standard_normal((200, 96)) @ rng.standard_normal((96, 96))
        h = x.T @ x
        found = searched(w, format, rule, h, divisor)
        assert not np.array_equal(found, plain.scales)
        for k in (-300, -1, 1, 300):  # of two powers of two a product only moves the exponent
            assert np.array_equal(searched(w, format, rule, h * 2.0**k, divisor), found)
    diagonal = np.diag(np.exp2(rng.integers(-6, 7, 96)))  # powers of two, so that e (h e) and h (e e) are the same bits
    assert np.array_equal(searched(w, format, "hessian_block", diagonal, divisor), searched(w, format, "hessian", diagonal, divisor))
    assert not np.array_equal(searched(w, format, "hessian", diagonal, divisor), plain.scales)


def read_back(groups, bits, format, divisor):
    """float32 values of groups (..., G) under stored scales (...), by ml_dtypes."""
    steps = (bits.view(SCALE_DTYPES[format]).astype(np.float32) / np.float32(divisor))[..., None]
    return steps * (groups / steps).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
SUMMED = 1 + 33 * 2.0**-53  # of two sums of at most 32 squares in any two orders, each rounded as often


@pytest.mark.parametrize("name", ["normal", "student", "ties"])
def test_four_over_six_takes_the_better_of_its_two_scales(name):
    rng = np.random.default_rng(32)
    if name == "ties":
        w, divisor = lattice("ties", "nvfp4"), 1.0
    else:
        w, divisor = with_small_groups((rng.standard_normal if name == "normal" else lambda s: rng.standard_t(3, s))((64, 160)).astype(np.float32)), None
    q = mg.quantize(w, "nvfp4", scales="four_over_six", tensor_scale=divisor)
    groups = w.reshape(len(w), -1, 16)
    largest = np.abs(groups).max(-1)
    six, four = (nvfp4_bits(largest / np.float32(n), q.tensor_scale) for n in (6, 4))
    six, four = np.where(six == 0, 0x20, six).astype(np.uint8), np.where(four == 0, 0x20, four).astype(np.uint8)
    to_six, to_four = (squares(groups, read_back(groups, bits, "nvfp4", q.tensor_scale)) for bits in (six, four))
    assert ((q.scales == six) | (q.scales == four)).all()
    taken = np.where(q.scales == six, to_six, to_four)
    assert (taken <= np.minimum(to_six, to_four) * SUMMED).all()  # so never worse than absmax, which is `six`
    assert ((q.scales == four) & (six != four)).mean() > 0.1 and ((q.scales == six) & (six != four)).mean() > 0.1
    if name == "ties":  # multiples of a unit: sums are exact
        equal = (to_six == to_four) & (six != four)
        assert equal.sum() > 10 and (q.scales == six)[equal].all()
    # amax / 4 lies four or five E4M3 steps above amax / 6, inside the range of mse. Where amax / 6 vanishes, 0x20 rounds the whole group to zeros, which no scale loses more than.
    mse = mg.quantize(w, "nvfp4", scales="mse", tensor_scale=q.tensor_scale)
    assert (squares(groups, mse.dequantize().reshape(groups.shape)) <= taken * SUMMED).all()


# ---- Every rule

RULES = [("nvfp4", search, "even") for search in ("absmax", "fpquant_mse", "mse", "four_over_six", "hessian", "hessian_block")]
RULES += [("mxfp4", search, rule) for search in ("absmax", "fpquant_mse", "mse", "hessian", "hessian_block") for rule in mg.MX_RULES] + [("mxfp4", "quest", "even")]


def quantized(w, format, search, rule, hessian=None):
    if search in ("hessian", "hessian_block"):
        return mg.quantize_layer(w, hessian, mg.Recipe(format, scales=search, mx_rule=rule, solver="rtn", order="natural"))
    return mg.quantize(w, format, scales=search, mx_rule=rule)


def moment(cols):
    x = np.random.default_rng(35).standard_normal((3 * cols, cols)) @ (np.eye(cols) + 0.3)
    return reference.rotate_hessian(x.T @ x / len(x), None)


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize(("format", "search", "rule"), RULES)
def test_every_rule_stores_what_decodes_and_gives_the_bytes_of_the_reference(format, search, rule, name):
    w = AWKWARD[name]
    h = moment(w.shape[1])
    q = quantized(w, format, search, rule, h)
    decoded = q.scales.view(SCALE_DTYPES[format]).astype(np.float32)
    assert np.isfinite(decoded).all() and (decoded > 0).all()
    assert np.isfinite(q.dequantize()).all()
    dead = ~w.reshape(*q.scales.shape, -1).any(-1)
    assert (q.scales[dead] == (0x20 if format == "nvfp4" else 0)).all()
    assert not mg.unpack(q.codes)[np.repeat(dead, FORMATS[format], axis=1)].any()
    with np.errstate(over="ignore"):  # x / step saturates in the reference too
        scales = reference.find_scales(w, format, search, rule, q.tensor_scale, h)
        codes = reference.encode_e2m1(w / np.repeat(reference.steps_of(scales, format, q.tensor_scale), FORMATS[format], axis=1))
    assert np.array_equal(q.scales, scales)
    assert np.array_equal(mg.unpack(q.codes), codes)


@pytest.mark.parametrize(("format", "search", "rule"), [r for r in RULES if r[1] in ("hessian", "hessian_block")])
def test_a_dead_column_weighs_in_its_groups_scale_what_the_solver_gives_it(format, search, rule):
    """Every other column and all of the last group; and all there are."""
    w, h = np.random.default_rng(36).standard_normal((40, 96), dtype=np.float32), moment(96)
    for dead in ([*range(1, 64, 2), *range(64, 96)], list(range(96))):
        partly = h.copy()
        partly[dead], partly[:, dead] = 0, 0
        q = quantized(w, format, search, rule, partly)
        assert np.array_equal(q.scales, reference.find_scales(w, format, search, rule, q.tensor_scale, reference.with_dead_columns(partly, 0.01)))


@pytest.mark.parametrize(("format", "search", "rule"), [r for r in RULES if r[1] != "fpquant_mse" or r[2] == "even"])  # its hundred steps a group are slow in the reference
def test_every_rule_gives_the_bytes_of_the_reference_on_leaf(format, search, rule, leaf):
    for name, w in leaf.weights.items():
        h = leaf.hessians[name]
        q = quantized(w, format, search, rule, h)
        assert np.array_equal(q.scales, reference.find_scales(w, format, search, rule, q.tensor_scale, reference.rotate_hessian(h, None))), name


# ---- Activations


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize(("format", "rule"), [(format, rule) for format, rules in (("nvfp4", ("absmax", "mse", "four_over_six")), ("mxfp4", ("absmax", "even", "ceil", "mse", "quest"))) for rule in rules])
def test_an_activation_rule_is_the_weights_rule_of_that_name(format, rule, name):
    x = AWKWARD[name]
    q = mg.quantize(x, format, scales=rule)
    assert np.array_equal(mg.round_activations(x, format, rule=rule), q.dequantize())
    calibrated = q.tensor_scale * 0.7 if format == "nvfp4" and q.tensor_scale != 1 and np.abs(x).max() < 2.0**100 else q.tensor_scale  # other than its own: larger inputs than calibration saw
    assert np.array_equal(mg.round_activations(x, format, rule=rule, tensor_scale=calibrated), mg.quantize(x, format, scales=rule, tensor_scale=calibrated).dequantize())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("factor", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("format", FORMATS)
def test_mse_loses_no_group_more_than_absmax(format, factor, dtype, leaf):
    """Of a bfloat16 x too: amax / 6 rounded to bfloat16 moves absmax's scale by one step at most, which the search covers."""
    rng = np.random.default_rng(36)
    for x in (with_small_groups(rng.standard_t(3, (64, 96)).astype(np.float32)), leaf.inputs["layers.2.mlp.down_proj"][:256], AWKWARD["ties"]):
        divisor = mg.quantize(x, format).tensor_scale * factor if format == "nvfp4" else None
        if dtype == "bfloat16":
            narrow = x.astype(ml_dtypes.bfloat16)
            x = narrow.astype(np.float32)
            mse, absmax = (mg.round_activations(narrow.view(np.uint16), format, rule=rule, tensor_scale=divisor, dtype="bfloat16") for rule in ("mse", "absmax"))
        else:
            mse, absmax = (mg.round_activations(x, format, rule=rule, tensor_scale=divisor) for rule in ("mse", "absmax"))
        searched, plain = (squares(*(a.reshape(len(x), -1, FORMATS[format]) for a in (x, y))) for y in (mse, absmax))
        assert (searched <= plain * SUMMED).all()
        assert (searched < 0.99 * plain).any()


# ---- Losses that no number holds


def over_decades(decades, cols=128):
    """(W, H): columns over so many decades, mixed, so that without damping feedback grows as far."""
    rng = np.random.default_rng(1)
    scale = 10.0 ** rng.uniform(-decades, 0, cols)
    x = rng.standard_normal((2 * cols + 3, cols)) @ (np.eye(cols) + rng.standard_normal((cols, cols)) / 8)
    h = x.T @ x
    return rng.standard_normal((37, cols)).astype(np.float32), (h + h.T) / 2 * scale[:, None] * scale


@pytest.mark.parametrize("format", FORMATS)
def test_feedback_beyond_float32_is_had_in_float64_and_said(format):
    w, h = over_decades(30)
    recipe = mg.Recipe(format, scales="gptq", order="group", damping=0.0, rounds=2, precision="float32")
    q, exact = mg.quantize_layer(w, h, recipe), mg.quantize_layer(w, h, replace(recipe, precision="float64"))
    assert q.report.precision == "float64"
    assert np.array_equal(q.codes, exact.codes) and np.array_equal(q.scales, exact.scales)
    assert np.isfinite(q.report.damped_errors).all()
    assert mg.quantize_layer(w, over_decades(2)[1], recipe).report.precision == "float32"


@pytest.mark.parametrize("format", FORMATS)
def test_a_search_in_which_every_candidate_overflows_takes_its_first(format):
    w, h = over_decades(0)
    factor = mg.Factor(h * 1e200, order="group", group_size=mg.FORMATS[format].group_size)
    divisor = mg.quantize(w, format).tensor_scale
    answers = set()
    for round in range(4):
        junk = [np.full(10_000 + round, float(round)) for _ in range(round)]  # memory that the next call may be given
        del junk
        scales = np.zeros((37, w.shape[1] // mg.FORMATS[format].group_size), np.uint8)
        codes, losses = _core.solve(format, w, 0, scales, divisor, factor.core, None, "float32", True, "even", 0, 1)
        assert not np.isfinite(losses).any()
        answers.add(codes.tobytes() + scales.tobytes())
    assert len(answers) == 1
    first_group = factor.order[0] // mg.FORMATS[format].group_size  # nothing has been fed back to it yet
    absmax = _core.find_scales(format, "absmax", "even", w, 0, divisor, None, 1)[:, first_group].astype(int)
    assert np.array_equal(scales[:, first_group], np.maximum(absmax - (8 if format == "nvfp4" else 2), 1))
