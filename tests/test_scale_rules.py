"""What each scale rule means: MX rules in exact arithmetic, E4M3 scales by brute force, fpquant_mse by NumPy's own power, quest by QuTLASS' formula, and what stands where no scale can be
computed."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

import mrgptq as mg
from mrgptq import reference
from scales_by_hand import E2M1, FLT_MAX, mx_step, nvfp4_bits

def magnitudes():
    """Each place where a rule may turn over, the number before it and the one behind, for powers of two from end to end; and any."""
    turns = np.ldexp(np.float32([[1.0], [1.5], [1.75]]), np.arange(-119, 120, 7)).reshape(-1)
    rng = np.random.default_rng(12)
    anywhere = np.exp2(rng.uniform(-120, 120, 300)).astype(np.float32)
    return np.concatenate([turns, np.nextafter(turns, np.float32(0)), np.nextafter(turns, np.float32(np.inf)), anywhere])


@pytest.mark.parametrize("rule", mg.MX_RULES)
def test_an_mx_scale_is_what_its_rule_says(rule):
    """The largest value at any place of its group, of either sign."""
    amax, rng = magnitudes(), np.random.default_rng(13)
    groups = np.linspace(-0.9, 0.9, 32).astype(np.float32) * amax[:, None]
    places = rng.integers(0, 32, len(amax))
    groups[np.arange(len(amax)), places] = amax * rng.choice(np.float32([-1, 1]), len(amax))
    q = mg.quantize(groups, "mxfp4", scales=rule)
    for a, bits, value in zip(amax.tolist(), q.scales[:, 0].tolist(), q.dequantize()[np.arange(len(amax)), places].tolist(), strict=True):
        step = mx_step(Fraction(a), rule)
        assert Fraction(2) ** (bits - 127) / Fraction(q.tensor_scale) == step
        if rule in ("ceil", "four-thirds"):  # never clip
            assert Fraction(a) <= 6 * step
        error = abs(Fraction(a) - abs(Fraction(value)))
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


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_a_layer_by_quest_has_the_mask_too(solver):
    """Of its own, rotated weight: what GPTQ feeds back moves values, not what the scales cut off."""
    rng = np.random.default_rng(3)
    w, x = rng.standard_normal((8, 64)).astype(np.float32), rng.standard_normal((256, 64))
    q = mg.quantize_layer(w, x.T @ x, mg.Recipe("mxfp4", rotation=32, scales="quest", solver=solver))
    plain = mg.quantize(mg.Hadamard(32).apply(w), "mxfp4", scales="quest")
    assert np.array_equal(q.scales, plain.scales) and np.array_equal(q.clip_mask, plain.clip_mask) and not q.clip_mask.all()
    assert mg.quantize_layer(w, x.T @ x, mg.Recipe("mxfp4", solver=solver)).clip_mask is None


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
