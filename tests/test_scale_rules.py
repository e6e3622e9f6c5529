"""What each scale rule means: MX rules in exact arithmetic, E4M3 scales by brute force, fpquant_mse by NumPy's own power, searches by exhaustion, quest by QuTLASS' formula, the divisor
fitted in turn with the scales, activations by each rule, and what stands where no scale can be computed."""

import re
from fractions import Fraction
from functools import lru_cache

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mrgptq as mg
from mrgptq import reference
from mrgptq.jobs import make_plan, quantize_checkpoint

E2M1 = [Fraction(v) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]


def mx_step(a, rule):
    """The step of an MX rule as its definition says it, for a Fraction a > 0."""
    k = next(k for k in range(-300, 300) if Fraction(2) ** k <= a < Fraction(2) ** (k + 1))
    floor = Fraction(2) ** (k - 2)
    if rule == "floor":
        return floor
    if rule == "ceil":
        return next(s for s in (floor, 2 * floor) if a <= 6 * s)  # and half of `floor` would not do: 6/2 * floor < 4 * floor <= a
    if rule == "even":
        return 2 * floor if a / Fraction(2) ** k >= Fraction(7, 4) else floor
    return floor * Fraction(4, 3)


MAGNITUDES = st.floats(2.0**-120, 2.0**120, width=32) | st.builds(
    lambda m, k, toward: float(np.nextafter(np.float32(m * 2.0**k), np.float32(toward))) if toward is not None else m * 2.0**k,
    st.sampled_from([1.0, 1.5, 1.75]), st.integers(-119, 119), st.sampled_from([None, 0.0, np.inf]),
)  # fmt: skip


@pytest.mark.parametrize("rule", mg.MX_RULES)
@settings(max_examples=300, deadline=None)
@given(a=MAGNITUDES, place=st.integers(0, 31), negative=st.booleans())
def test_an_mx_scale_is_what_its_rule_says(rule, a, place, negative):
    group = np.linspace(-0.9, 0.9, 32).astype(np.float32) * np.float32(a)
    group[place] = -a if negative else a
    q = mg.quantize(group[None], "mxfp4", scales=rule)
    step = mx_step(Fraction(a), rule)
    assert Fraction(2) ** (int(q.scales[0, 0]) - 127) / Fraction(q.tensor_scale) == step
    if rule in ("ceil", "four-thirds"):  # never clip
        assert Fraction(a) <= 6 * step
    error = abs(Fraction(a) - abs(Fraction(float(q.dequantize()[0, place]))))
    if rule != "four-thirds":  # powers of two: every quotient is exact, so the nearest value it is
        assert error == min(abs(Fraction(a) - v * step) for v in E2M1)


@pytest.mark.parametrize(("rule", "back"), [("floor", 6.0), ("ceil", 8.0), ("even", 8.0), ("four-thirds", 8.0)])
def test_seven_clips_under_floor_alone(rule, back):
    assert abs(mg.quantize(np.full((1, 32), 7.0), "mxfp4", scales=rule).dequantize()[0, 0] - back) <= 8 * 2.0**-24  # 4/3 is not a float32 number


def test_nvfp4_scale_is_the_nearest_e4m3_number():
    w = np.random.default_rng(11).standard_t(2, (24, 96)).astype(np.float32)
    q = mg.quantize(w, "nvfp4")
    amax = np.abs(w).max()
    assert q.tensor_scale == np.float32(2688) / amax
    wanted = np.abs(w).reshape(24, -1, 16).max(-1).astype(np.float64) / 6 * q.tensor_scale
    stored = q.scales.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    assert stored.max() == 448
    storable = np.arange(1, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    best = np.abs(storable - wanted[..., None]).min(-1)
    # a / 6 and its product with the divisor are rounded once each, 2^-24 relative: twice that for the scale taken and for the one passed over.
    assert (np.abs(stored - wanted) <= best + 4.001 * 2.0**-24 * wanted).all()


def steps_and_sums(groups):
    """fpquant_mse as FP-Quant defines it: the hundred steps of every group (float32) and the sum of |error|^2.4 that each leaves, by NumPy's power and ml_dtypes' rounding."""
    factors = np.array([1 - 0.8 * i / 100 for i in range(100)]).astype(np.float32)
    steps = factors * (np.abs(groups).max(-1, keepdims=True) / np.float32(6))
    wide = steps[..., None].astype(np.float64)
    rounded = (groups[:, None, :] / wide).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    return steps, (np.abs(groups[:, None, :] - rounded * wide) ** 2.4).sum(-1)


def decided(sums):
    """Where the least sum is the least for sure: sums whose terms are within 1e-11 (test_power_2_4_is_accurate) and not nearer to each other than 1e-9."""
    least, second = np.sort(sums, axis=1)[:, :2].T
    return second - least > 1e-9 * least


def nvfp4_bits(step, divisor):
    return np.minimum(step * np.float32(divisor), np.float32(448)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


@pytest.mark.parametrize(("format", "rule"), [("nvfp4", "even")] + [("mxfp4", rule) for rule in mg.MX_RULES])
def test_fpquant_mse_finds_the_least_sum(format, rule):
    rng = np.random.default_rng(24)
    w = (rng.standard_t(4, (100, 96)) * np.exp2(rng.integers(-4, 5, (100, 1)))).astype(np.float32)
    steps, sums = steps_and_sums(w.reshape(-1, mg.FORMATS[format].group_size))
    clear = decided(sums)
    assert clear.mean() > 0.99
    found = np.take_along_axis(steps, sums.argmin(1)[:, None], 1)[clear, 0]
    assert (found < steps[clear, 0]).mean() > 0.5  # else absmax would pass
    q = mg.quantize(w, format, scales="fpquant_mse", mx_rule=rule)
    if format == "nvfp4":
        expected = nvfp4_bits(found, q.tensor_scale)
    else:
        expected = [int(np.log2(float(mx_step(Fraction(float(a)), rule) * int(q.tensor_scale)))) + 127 for a in np.float32(6) * found]
    assert np.array_equal(q.scales.reshape(-1)[clear], expected)


def test_fpquant_mse_decides_between_sums_that_hardly_differ():
    """Pairs of groups one float32 step of one element apart, between which the best step jumps: their two least sums agree to about 1e-8."""
    rng = np.random.default_rng(25)
    divisor = 6 * 256.0
    below = np.concatenate([np.ones((1000, 1)), rng.uniform(-0.6, 0.6, (1000, 15))], axis=1).astype(np.float32)  # amax 1: one factor, one E4M3 scale, in every group
    above = below.copy()
    below[:, 1], above[:, 1] = rng.uniform(0.05, 0.3, 1000), rng.uniform(0.4, 0.9, 1000)

    def bits(groups):
        steps, sums = steps_and_sums(groups)
        return nvfp4_bits(np.take_along_axis(steps, sums.argmin(1)[:, None], 1)[:, 0], divisor)

    jumps = bits(below) != bits(above)
    below, above = below[jumps], above[jumps]
    assert len(below) > 200
    at_below = bits(below)
    for _ in range(24):  # float32 numbers in [0.05, 0.9] are halved apart after as many steps
        middle = below.copy()
        middle[:, 1] = (below[:, 1] + above[:, 1]) / 2
        same = bits(middle) == at_below
        below[same], above[~same] = middle[same], middle[~same]
    groups = np.concatenate([below, above])
    least, second = np.sort(steps_and_sums(groups)[1], axis=1)[:, :2].T
    assert np.median((second - least) / least) < 1e-6
    clear = decided(steps_and_sums(groups)[1])
    assert clear.mean() > 0.8
    q = mg.quantize(groups, "nvfp4", scales="fpquant_mse", tensor_scale=divisor)
    assert np.array_equal(q.scales[clear, 0], bits(groups)[clear])
    assert np.array_equal(q.scales, reference.find_scales(groups, "nvfp4", "fpquant_mse", g=divisor))


def test_power_2_4_is_accurate():
    rng = np.random.default_rng(5)
    e = np.exp2(rng.uniform(-150, 128, 10**5)) * rng.choice([-1, 1], 10**5)  # what errors of float32 numbers can be
    exact = np.abs(e) ** 2.4  # NumPy's own power is good to 1e-15
    assert (np.abs(reference.power_2_4(e) - exact) <= 1e-11 * exact).all()
    assert reference.power_2_4(np.zeros(3)).tolist() == [0, 0, 0]


def test_zero_and_vanishing_groups_keep_what_compressed_tensors_writes():
    w = np.zeros((4, 64), dtype=np.float32)
    for format, scale in (("nvfp4", 0x20), ("mxfp4", 0)):
        q = mg.quantize(w, format)
        assert q.tensor_scale == 1 and (q.scales == scale).all() and not q.codes.any()
    w[0, 0], w[1, 0] = 1, 2.0**-20  # (2^-20 / 6) * 2688 < 2^-10: nothing in E4M3
    q = mg.quantize(w, "nvfp4")
    assert q.tensor_scale == 2688 and q.scales[0].tolist() == [0x7E, 0x20, 0x20, 0x20] and (q.scales[1:] == 0x20).all() and not q.codes[1:].any()
    assert mg.quantize(w, "mxfp4").scales.tolist() == [[125, 0], [105, 0], [0, 0], [0, 0]]


def test_nvfp4_tensor_scale_at_its_ends():
    assert mg.nvfp4_tensor_scale(0) == 1
    assert mg.nvfp4_tensor_scale(2.0**-149) == 1  # 2688 / amax overflows
    assert mg.nvfp4_tensor_scale(2688) == 1
    largest = np.arange(0x7F800000 - 1000, 0x7F800000, dtype=np.uint32).view(np.float32)
    divisors = np.array([mg.nvfp4_tensor_scale(amax) for amax in largest], dtype=np.float32)
    assert np.isfinite(np.float32(6) * (np.float32(448) / divisors)).all()
    assert (np.abs(divisors.astype(np.float64) * largest - 2688) <= 2688 * 2.0**-22).all()  # rounded once, and room for the next larger number


# ---- Searches over storable scales, by exhaustion

FORMATS = {"nvfp4": 16, "mxfp4": 32}
SCALE_DTYPES = {"nvfp4": ml_dtypes.float8_e4m3fn, "mxfp4": ml_dtypes.float8_e8m0fnu}
STORABLE = {"nvfp4": np.arange(1, 127, dtype=np.uint8), "mxfp4": np.arange(253, dtype=np.uint8)}  # positive, and 6 * step is finite
IN_RANGE = {"nvfp4": range(-8, 8), "mxfp4": range(-2, 3)}
LATTICE = ("normal", "laplace", "student", "ties")
FLT_MAX = float(np.finfo(np.float32).max)


def lattice(name, format, rows=32, groups=10):
    """(rows, cols) multiples of 2^-6 up to 64. With the divisor 1 every step, product and error of a search is a multiple of 2^-11 below 2^6, so that float32 and float64 hold it exactly."""
    rng = np.random.default_rng(LATTICE.index(name))
    shape = (rows, groups, FORMATS[format])
    spread = np.exp2(rng.integers(-5, 3, (rows, groups, 1)))
    if name == "ties":  # middles and values of the grid, and in half of the rows one magnitude in a group, so that several scales lose the same
        values = [*map(float, E2M1), *(float(a + b) / 2 for a, b in zip(E2M1[1:], E2M1[:-1], strict=True))]
        x = rng.choice([0, 0, 0, *values], shape)
        x[::2] = rng.choice(values, (rows // 2, groups, 1)) * rng.integers(0, 2, (rows // 2, *shape[1:]))
        x = x * rng.choice([-1, 1], shape) * np.exp2(rng.integers(-3, 4, (rows, groups, 1)))
    else:
        x = {"normal": rng.standard_normal, "laplace": lambda s: rng.laplace(size=s), "student": lambda s: rng.standard_t(3, s)}[name](shape) * spread * 4
    x = np.clip(np.rint(x * 64) / 64, -64, 64)
    x[0, 0] = 0
    return x.reshape(rows, -1).astype(np.float32)


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


def squares(groups, values):
    return np.square(groups.astype(np.float64) - values).sum(-1)


SUMMED = 1 + 33 * 2.0**-53  # of two sums of at most 32 squares in any two orders, each rounded as often


def with_small_groups(w):
    """Whole groups scaled down to where E4M3 scales are subnormal and further to where they vanish, and a group of zeros."""
    w = w.copy()
    w[1::4] *= np.exp2(-np.arange(8, 8 + len(w[1::4]), dtype=np.float32))[:, None]
    w[2, :32] = 0
    return w


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


# ---- quest


def test_quest_is_the_formula_of_qutlass():
    """Its reference: 2^floor(log2(std * 2.92247856 / 6 + 1e-8)), the standard deviation about the mean in float64; the 1e-8, which ours is without, counts next to a power of two alone."""
    rng = np.random.default_rng(33)
    w = np.concatenate([rng.standard_normal((64, 96)), rng.standard_t(2, (64, 96)), rng.standard_normal((64, 96)) + 3, rng.exponential(size=(64, 96))]) * np.exp2(rng.integers(-8, 9, (256, 1)))
    w = w.astype(np.float32)
    q = mg.quantize(w, "mxfp4", scales="quest")
    exponent = np.log2(w.astype(np.float64).reshape(256, 3, 32).std(-1) * (2.92247856 / 6) + 1e-8)
    clear = np.abs(exponent - np.rint(exponent)) > 1e-4  # 1e-8 beside 2^-10 moves the logarithm by 1.5e-5; there is nothing smaller here
    assert clear.mean() > 0.99 and exponent.min() > -10
    assert np.array_equal(q.scales[clear].astype(int) - 127, np.floor(exponent[clear]))
    assert len(np.unique(q.scales)) > 10
    scaled = np.abs(w.reshape(256, 3, 32) / q.scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)[..., None]).reshape(w.shape)
    assert np.array_equal(q.clip_mask, scaled < 6) and not q.clip_mask.all()
    packed = np.packbits(q.clip_mask, axis=1, bitorder="little")
    for r, b, i in zip(rng.integers(0, 256, 500), rng.integers(0, 12, 500), rng.integers(0, 8, 500), strict=True):
        assert packed[r, b] >> i & 1 == (scaled[r, 8 * b + i] < 6)  # bit i of byte b is element 8 b + i
    assert (np.abs(q.dequantize())[~q.clip_mask] == (6 * np.repeat(q.scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32), 32, axis=1))[~q.clip_mask]).all()


def test_a_value_of_exactly_six_steps_is_masked_as_qutlass_masks_it():
    """σ of half 0, half 7 is 3.5, and 3.5 * 0.487 = 1.7: the step is 1, also with three other values among them. 6 is not below 6 steps."""
    w = np.tile(np.float32([0, 7]), (1, 16))
    w[0, 1], w[0, 3], w[0, 5] = 6, np.nextafter(np.float32(6), np.float32(0)), -6
    q = mg.quantize(w, "mxfp4", scales="quest")
    assert q.scales[0, 0] == 127
    assert q.clip_mask[0, :6].tolist() == [True, False, True, True, True, False] and not q.clip_mask[0, 7::2].any()


def test_quest_of_groups_without_deviation():
    """log2(0) is -inf: the smallest scale stands for it. A zero group is not clipped; a constant one is, to nearly zero."""
    w = np.zeros((3, 64), dtype=np.float32)
    w[1, :32], w[2, :32], w[2, 32:] = 1, -FLT_MAX, 2.0**-149
    q = mg.quantize(w, "mxfp4", scales="quest")
    assert not q.scales.any()
    zeros = w == 0
    assert q.clip_mask[zeros].all() and not q.clip_mask[np.abs(w) >= 1].any() and q.clip_mask[2, 32:].all()
    values = q.dequantize()
    assert not values[zeros].any() and (values[1, :32] == 6 * 2.0**-127).all() and (values[2, :32] == -6 * 2.0**-127).all()


@pytest.mark.parametrize("scales", ["absmax", "mse", "fpquant_mse"])
def test_no_other_rule_has_a_clip_mask(scales):
    assert mg.quantize(np.ones((1, 32)), "mxfp4", scales=scales).clip_mask is None


# ---- Every rule


RULES = [("nvfp4", search, "even") for search in ("absmax", "fpquant_mse", "mse", "four_over_six", "hessian", "hessian_block")]
RULES += [("mxfp4", search, rule) for search in ("absmax", "fpquant_mse", "mse", "hessian", "hessian_block") for rule in mg.MX_RULES] + [("mxfp4", "quest", "even")]


def quantized(w, format, search, rule, hessian=None):
    if search in ("hessian", "hessian_block"):
        return mg.quantize_layer(w, hessian, mg.Recipe(format, scales=search, mx_rule=rule, solver="rtn", order="natural"))
    return mg.quantize(w, format, scales=search, mx_rule=rule)


def awkward():
    rng = np.random.default_rng(34)
    shape = (24, 96)
    signs = rng.choice([-1.0, 1.0], shape)
    huge = rng.uniform(0.4, 1, shape) * FLT_MAX * signs
    huge[::5, ::7] = FLT_MAX
    small = with_small_groups(rng.standard_normal(shape).astype(np.float32))
    data = {
        "normal": rng.standard_normal(shape),
        "heavy tails": rng.standard_t(2, shape),
        "ties": lattice("ties", "nvfp4", 24, 6),
        "ties under a power of two": np.concatenate([lattice("ties", "mxfp4", 24, 2), np.full((24, 32), 10.5)], axis=1),  # 2688 / 10.5 = 256
        "small groups": small,
        "wide": rng.standard_normal(shape) * np.exp2(rng.integers(-126, 126, (24, 3))).repeat(32, axis=1),
        "subnormal": rng.integers(-(2**12), 2**12, shape) * 2.0**-149,
        "a few units of the smallest number": rng.integers(-9, 10, shape) * 2.0**-149,
        "near overflow": huge,
        "one largest number": np.eye(1, 32) * FLT_MAX,
        "all largest": np.full((2, 64), FLT_MAX),
        "one smallest number": np.eye(1, 32) * 2.0**-149,
        "zero": np.zeros((3, 32)),
    }
    return {name: np.clip(x, -FLT_MAX, FLT_MAX).astype(np.float32) for name, x in data.items()}


AWKWARD = awkward()


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


@pytest.mark.parametrize(("format", "search", "rule"), [r for r in RULES if r[1] != "fpquant_mse" or r[2] == "even"])  # its hundred steps a group are slow in the reference
def test_every_rule_gives_the_bytes_of_the_reference_on_leaf(format, search, rule, leaf):
    for name, w in leaf.weights.items():
        h = leaf.hessians[name]
        q = quantized(w, format, search, rule, h)
        assert np.array_equal(q.scales, reference.find_scales(w, format, search, rule, q.tensor_scale, reference.rotate_hessian(h, None))), name


# ---- The alternating divisor


def layer_weights(seed, rows=48, cols=96):
    """Rows of unlike size and heavy tails, as weights have: there the divisor matters."""
    rng = np.random.default_rng(seed)
    return (rng.standard_t(5, (rows, cols)) * np.exp(rng.normal(0, 0.7, (rows, 1)))).astype(np.float32)


def total_error(weights, divisor, scales):
    """Σ (w - ŵ)² in float64 under one divisor."""
    return sum(float(squares(w, mg.quantize(w, "nvfp4", scales=scales, tensor_scale=divisor).dequantize()).sum()) for w in weights)


ONE_ULP = 2.0**-23  # a divisor is rounded to float32; sums in another order may push it over one border


@pytest.mark.parametrize("scales", ["absmax", "mse", "four_over_six", "fpquant_mse"])
def test_the_alternating_divisor_loses_no_more_and_is_that_of_the_reference(scales, leaf):
    cases = [[layer_weights(seed)] for seed in range(6)] + [[leaf.weights["layers.0.self_attn.k_proj"]]]
    gained = 0
    for weights in cases:
        divisor, plain = mg.alternating_tensor_scale(weights, scales), mg.quantize(weights[0], "nvfp4").tensor_scale
        assert divisor == np.float32(divisor)
        before, after = total_error(weights, plain, scales), total_error(weights, divisor, scales)
        assert after < before if divisor != plain else after == before
        gained += divisor != plain
        assert abs(divisor / float(reference.alternating_tensor_scale(weights, scales)) - 1) <= ONE_ULP
    assert gained >= 2


def test_the_alternating_divisor_takes_up_the_factor_of_least_squares():
    w = layer_weights(7)
    plain = mg.quantize(w, "nvfp4", scales="mse")
    assert mg.alternating_tensor_scale([w], iterations=0) == plain.tensor_scale
    factor = np.linalg.lstsq(plain.dequantize().astype(np.float64).reshape(-1, 1), w.astype(np.float64).reshape(-1), rcond=None)[0][0]  # w ≈ factor * ŵ: a divisor smaller by it
    once = mg.alternating_tensor_scale([w], iterations=1)
    assert abs(factor - 1) > 1e-4 and abs(once * factor / plain.tensor_scale - 1) <= ONE_ULP
    errors = [total_error([w], mg.alternating_tensor_scale([w], iterations=n), "mse") for n in range(5)]
    assert all(b <= a for a, b in zip(errors, errors[1:], strict=False)) and errors[1] < errors[0]


def test_a_divisor_for_several_matrices_is_that_of_their_rows_together():
    weights = [layer_weights(seed, rows) for seed, rows in ((8, 16), (9, 40), (10, 8))]
    together = mg.alternating_tensor_scale([np.concatenate(weights)])
    assert abs(mg.alternating_tensor_scale(weights) / together - 1) <= ONE_ULP
    assert abs(float(reference.alternating_tensor_scale(weights)) / together - 1) <= ONE_ULP
    assert abs(mg.alternating_tensor_scale(weights[:1]) / together - 1) > 1e-3


@pytest.mark.parametrize("name", AWKWARD)
def test_an_alternating_divisor_is_usable_on_awkward_matrices(name):
    w = AWKWARD[name]
    divisor = mg.alternating_tensor_scale([w])
    q = mg.quantize(w, "nvfp4", scales="mse", tensor_scale=divisor)
    assert np.isfinite(q.dequantize()).all()
    assert total_error([w], divisor, "mse") <= total_error([w], mg.quantize(w, "nvfp4").tensor_scale, "mse")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mg.alternating_tensor_scale([]), "weights is empty; at least one matrix is needed"),
        (lambda: mg.alternating_tensor_scale([np.ones((2, 24))]), "weights has 24 columns; nvfp4 needs a multiple of 16"),
        (lambda: mg.alternating_tensor_scale([np.ones((2, 16))], "quest"), "unknown scales for nvfp4 'quest'"),
        (lambda: mg.alternating_tensor_scale([np.full((2, 16), np.nan)]), "weights is nan at row 0, column 0"),
        (lambda: mg.Recipe("mxfp4", tensor_scale="alternating"), "unknown tensor_scale for mxfp4 'alternating'"),
    ],
)
def test_a_divisor_that_cannot_be_fitted_is_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(("scales", "by"), [("mse", "mse"), ("four_over_six", "four_over_six"), ("absmax", "absmax"), ("hessian", "mse"), ("gptq", "mse")])
@pytest.mark.parametrize("rotation", [None, 16])
def test_a_recipe_fits_the_divisor_in_its_own_basis(scales, by, rotation, leaf):
    name = "layers.1.self_attn.q_proj"
    family = [leaf.weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
    recipe = mg.Recipe("nvfp4", rotation=rotation, scales=scales, order="group", tensor_scale="alternating")
    rotated = [w if rotation is None else mg.Hadamard(rotation).apply(w) for w in family]
    own = mg.quantize_layer(family[0], leaf.hessians[name], recipe)
    assert own.tensor_scale == mg.alternating_tensor_scale(rotated[:1], by)
    shared = mg.shared_tensor_scale(family, recipe)
    assert shared == mg.alternating_tensor_scale(rotated, by) != mg.nvfp4_tensor_scale(max(np.abs(w).max() for w in rotated))
    layers = [mg.quantize_layer(w, leaf.hessians[name], recipe, tensor_scale=shared) for w in family]
    assert [q.tensor_scale for q in layers] == [shared] * 3


def test_a_checkpoint_by_an_alternating_divisor_has_one_for_each_family(leaf, leaf_folder, tmp_path):
    recipe = mg.Recipe("nvfp4", scales="mse", solver="rtn", order="natural", tensor_scale="alternating")
    quantize_checkpoint(make_plan(leaf_folder, tmp_path / "out", recipe))
    loaded = mg.load(tmp_path / "out")
    for block in range(4):
        for family in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"), ("self_attn.o_proj",), ("mlp.down_proj",)):
            expected = mg.shared_tensor_scale([leaf.weights[f"layers.{block}.{part}"] for part in family], recipe)
            assert {loaded[f"model.layers.{block}.{part}.weight"].tensor_scale for part in family} == {expected}


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
