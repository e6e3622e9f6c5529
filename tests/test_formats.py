"""E2M1, E4M3 and E8M0 against ml_dtypes: every pattern decoded, and encoders wherever they could part from it."""

import ml_dtypes
import numpy as np
import pytest

import mrgptq
from mrgptq import formats, reference

ML_DTYPES = {"e2m1": ml_dtypes.float4_e2m1fn, "e4m3": ml_dtypes.float8_e4m3fn, "e8m0": ml_dtypes.float8_e8m0fnu}
PATTERNS = {"e2m1": 16, "e4m3": 256, "e8m0": 256}
LARGEST = {"e2m1": 6.0, "e4m3": 448.0}
ENCODERS = [(module, element) for module in (formats, reference) for element in LARGEST]


def every_pattern(element):
    return np.arange(PATTERNS[element], dtype=np.uint8)


def expected_bits(x, element):
    """What ml_dtypes makes of finite or infinite float32 numbers, with two conventions of ours: beyond the largest E4M3 saturates, and E2M1 has one zero."""
    if element == "e4m3":
        x = np.clip(x, np.float32(-448), np.float32(448))  # ml_dtypes makes NaN of what lies above 464
    bits = x.astype(ML_DTYPES[element]).view(np.uint8)
    return np.where(bits == 8, 0, bits) if element == "e2m1" else bits


def ties_and_neighbours(element):
    """Every middle of two adjacent values, and the float32 numbers next to it; both signs."""
    values = every_pattern(element)[: PATTERNS[element] // 2].view(ML_DTYPES[element]).astype(np.float32)
    values = values[np.isfinite(values)]
    ties = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    assert np.array_equal(ties.astype(np.float64) * 2, values[1:].astype(np.float64) + values[:-1])  # the middles are float32 numbers themselves
    points = np.concatenate([ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf)), values])
    return np.concatenate([points, -points])


def half_precision(dtype):
    x = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
    return x[~np.isnan(x)]


def edges(element):
    largest = np.float32(LARGEST[element])
    beyond = np.float32([largest * 1.01, largest * 1.04, largest * 2, 1e30, np.finfo(np.float32).max, np.inf])
    around = np.concatenate([[0.0, largest, np.nextafter(largest, np.float32(0)), np.nextafter(largest, np.float32(np.inf))], beyond]).astype(np.float32)
    subnormals = np.concatenate([np.arange(1, 4096), 2 ** np.arange(23), 2**23 - np.arange(1, 4096)]).astype(np.uint32).view(np.float32)
    assert (subnormals < np.finfo(np.float32).tiny).all() and (subnormals > 0).all()
    x = np.concatenate([around, subnormals])
    return np.concatenate([x, -x])


@pytest.mark.parametrize("module", [formats, reference])
@pytest.mark.parametrize("element", PATTERNS)
def test_every_pattern_decodes_to_the_value_ml_dtypes_gives_it(module, element):
    bits = every_pattern(element)
    decoded, expected = getattr(module, f"decode_{element}")(bits), bits.view(ML_DTYPES[element]).astype(np.float32)
    assert decoded.dtype == np.float32
    nan = np.isnan(expected)
    assert nan.sum() == {"e2m1": 0, "e4m3": 2, "e8m0": 1}[element]
    assert np.array_equal(np.isnan(decoded), nan)
    assert np.array_equal(decoded[~nan].view(np.uint32), expected[~nan].view(np.uint32))  # bit for bit: -0 keeps its sign


def test_only_the_low_four_bits_of_an_e2m1_code_count():
    assert np.array_equal(formats.decode_e2m1(np.arange(256, dtype=np.uint8)), np.tile(formats.decode_e2m1(every_pattern("e2m1")), 16))


@pytest.mark.parametrize("points", ["float16", "bfloat16", "ties", "edges"])
@pytest.mark.parametrize(("module", "element"), ENCODERS)
def test_encoders_agree_with_ml_dtypes(module, element, points):
    x = {
        "float16": lambda: half_precision(np.float16),
        "bfloat16": lambda: half_precision(ml_dtypes.bfloat16),
        "ties": lambda: ties_and_neighbours(element),
        "edges": lambda: edges(element),
    }[points]()
    bits = getattr(module, f"encode_{element}")(x)
    assert bits.dtype == np.uint8
    assert np.array_equal(bits, expected_bits(x, element))


@pytest.mark.parametrize("element", LARGEST)
def test_encoders_agree_with_ml_dtypes_on_ten_million_random_numbers(element):
    rng = np.random.default_rng(2509)
    x = rng.integers(0, 2**32, 10**7, dtype=np.uint32).view(np.float32)
    x = np.where(np.isfinite(x), x, np.float32(0))
    # Uniform bits seldom fall into the range of the format: a second, equal share is spread over it, and a bit beyond.
    inside = rng.uniform(-1.1 * LARGEST[element], 1.1 * LARGEST[element], len(x) // 2).astype(np.float32)
    inside[::2] *= np.exp2(rng.integers(-12, 1, len(inside[::2]))).astype(np.float32)
    for batch in (x, inside):
        assert np.array_equal(getattr(formats, f"encode_{element}")(batch), expected_bits(batch, element))


@pytest.mark.parametrize("element", LARGEST)
def test_what_decodes_encodes_to_the_same_pattern(element):
    bits = every_pattern(element)
    values = getattr(formats, f"decode_{element}")(bits)
    numbers = ~np.isnan(values)
    expected = np.where(bits == 8, 0, bits) if element == "e2m1" else bits
    assert np.array_equal(getattr(formats, f"encode_{element}")(values[numbers]), expected[numbers])


def test_e8m0_agrees_with_ml_dtypes_on_every_power_of_two():
    powers = np.ldexp(1.0, np.arange(-127, 128)).astype(np.float32)
    assert np.array_equal(formats.encode_e8m0(powers), powers.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8))


def test_e8m0_takes_the_power_of_two_at_or_below_and_clamps():
    rng = np.random.default_rng(8)
    x = rng.integers(1, 0x7F800000, 10**6, dtype=np.uint32).view(np.float32)  # every bit pattern between 0 and infinity
    x[:3] = [np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).tiny]
    exponent = np.frexp(x)[1] - 1  # x = m * 2^exponent, 1 <= m < 2
    assert np.array_equal(formats.encode_e8m0(x), np.clip(exponent, -127, 127) + 127)
    assert formats.encode_e8m0(np.float32(np.inf)) == 254


@pytest.mark.parametrize("element", PATTERNS)
def test_nan_is_refused(element):
    with pytest.raises(ValueError, match="x holds NaN"):
        getattr(formats, f"encode_{element}")(np.array([1.0, np.nan], dtype=np.float32))


@pytest.mark.parametrize("x", [0.0, -0.0, -1.0, -np.inf])
def test_e8m0_refuses_what_is_not_positive(x):
    with pytest.raises(ValueError, match="not positive; E8M0 has neither zero nor sign"):
        formats.encode_e8m0(np.float32([1.0, x]))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0, 5)])
@pytest.mark.parametrize("element", PATTERNS)
def test_any_shape_goes_in_and_comes_out(element, shape):
    bits = getattr(formats, f"encode_{element}")(np.full(shape, 2.0))
    assert bits.shape == shape
    values = getattr(formats, f"decode_{element}")(bits)
    assert values.shape == shape
    assert np.array_equal(values, np.full(shape, 2.0))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("element", LARGEST)
def test_other_floats_are_taken_as_float32(element, dtype):
    x = np.random.default_rng(3).standard_normal(1000).astype(dtype)
    assert np.array_equal(getattr(formats, f"encode_{element}")(x), expected_bits(x.astype(np.float32), element))
    assert np.array_equal(getattr(formats, f"encode_{element}")([1e300, -1e300]), expected_bits(np.float32([np.inf, -np.inf]), element))


def test_block_formats_are_data():
    assert {name: (f.group_size, f.scale_dtype, f.bits_per_weight) for name, f in mrgptq.FORMATS.items()} == {
        "mxfp4": (32, "F8_E8M0", 4.25),
        "nvfp4": (16, "F8_E4M3", 4.5),
    }
    with pytest.raises(ValueError, match="unknown format 'int4'; known: mxfp4, nvfp4"):
        formats.block_format("int4")
