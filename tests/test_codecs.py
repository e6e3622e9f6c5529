"""Matrices to blocks and back: the core against mrgptq.reference on awkward data, every dtype, stride and number of threads against the plain array."""

import ml_dtypes
import numpy as np
import pytest

import mrgptq as mg
from mrgptq import reference
from mrgptq.arrays import as_float32

FORMATS = ("nvfp4", "mxfp4")
SEARCHES = {"nvfp4": ("absmax", "fpquant_mse", "mse", "four_over_six"), "mxfp4": ("absmax", "fpquant_mse", "mse")}
RULES = [("nvfp4", search, "even") for search in SEARCHES["nvfp4"]] + [("mxfp4", search, rule) for search in SEARCHES["mxfp4"] for rule in mg.MX_RULES] + [("mxfp4", "quest", "even")]
SCALE_DTYPE = {"nvfp4": ml_dtypes.float8_e4m3fn, "mxfp4": ml_dtypes.float8_e8m0fnu}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FLT_MAX = np.finfo(np.float32).max


def group_factors(rng, low, high, shape):
    return np.repeat(np.exp2(rng.integers(low, high, (shape[0], shape[1] // 16))), 16, axis=1)


def _awkward():
    rng = np.random.default_rng(11)
    shape = (24, 96)
    normal = rng.standard_normal(shape)
    middles = (E2M1[1:] + E2M1[:-1]) / 2
    signs = rng.choice([-1.0, 1.0], shape)
    zeros_among = normal * rng.integers(0, 2, (24, 6)).repeat(16, axis=1)  # whole groups of zeros
    zeros_among[0, 1:32], zeros_among[1, 17:32] = 0, -0.0
    edges = np.array([m * np.float32(2) ** e for m in (1, 1.5, 1.75) for e in (-3, 0, 4)], dtype=np.float32)
    edges = np.concatenate([edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(9))])
    at_the_edges = rng.uniform(-1, 1, (len(edges), 32)) * 0.12  # below the smallest edge
    at_the_edges[np.arange(len(edges)), rng.integers(0, 32, len(edges))] = edges
    huge = rng.uniform(0.4, 1, shape) * FLT_MAX * signs
    huge[::5, ::7] = FLT_MAX
    data = {
        "normal": normal,
        "heavy tails": rng.standard_t(2, shape),
        "wide": normal * group_factors(rng, -126, 127, shape) * 0.25,
        "groups of zeros": zeros_among,
        "subnormal": rng.integers(-(2**12), 2**12, shape) * 2.0**-149,
        "a few units of the smallest number": rng.integers(-9, 10, shape) * 2.0**-149,
        "near overflow": huge,
        "ties": rng.choice(np.concatenate([middles, E2M1]), shape) * signs * group_factors(rng, -6, 2, shape),
        "edges of the rules": at_the_edges,
        "zero": np.zeros((3, 32)),
        "one smallest number": np.eye(1, 32) * 2.0**-149,
        "one largest number": np.eye(1, 32) * float(FLT_MAX),
        "all largest": np.full((2, 64), FLT_MAX),
    }
    return {name: np.clip(x, -FLT_MAX, FLT_MAX).astype(np.float32) for name, x in data.items()}


AWKWARD = _awkward()


def decoded_steps(q):
    """Step of every element, read by ml_dtypes: fl32(scale / divisor)."""
    steps = q.scales.view(SCALE_DTYPE[q.format]).astype(np.float32) / np.float32(q.tensor_scale)
    return np.repeat(steps, mg.FORMATS[q.format].group_size, axis=1)


def assert_same(a, b):
    assert a.tensor_scale == b.tensor_scale
    assert np.array_equal(a.scales, b.scales)
    assert np.array_equal(a.codes, b.codes)


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize(("format", "search", "rule"), RULES)
def test_core_gives_the_bytes_of_the_reference(format, search, rule, name):
    w = AWKWARD[name]
    q = mg.quantize(w, format, scales=search, mx_rule=rule)
    with np.errstate(over="ignore" if search == "quest" else "warn"):  # a group of one number has no deviation, so that number is clipped, from beyond float32 where it is large
        codes, scales, divisor = reference.quantize(w, format, search, rule)
    assert q.tensor_scale == divisor
    assert np.array_equal(q.scales, scales)
    assert np.array_equal(q.codes, reference.pack(codes))
    assert np.array_equal(q.dequantize().view(np.uint32), reference.dequantize(codes, scales, format, divisor).view(np.uint32))


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize(("format", "search", "rule"), RULES)
def test_no_scale_and_no_value_is_lost(format, search, rule, name):
    w = AWKWARD[name]
    q = mg.quantize(w, format, scales=search, mx_rule=rule)
    steps = decoded_steps(q)
    assert np.isfinite(steps).all() and (steps > 0).all()
    values = steps * mg.unpack(q.codes).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.isfinite(values).all()
    assert np.array_equal(q.dequantize(), values)
    assert not (mg.unpack(q.codes) == 8).any()  # one zero
    assert (values * np.sign(w) >= 0).all()
    # A code is the nearest: the float32 quotient w / step is off by 2^-24 of itself at most, once for the code taken and once for the better one passed over. Below float32's normal
    # range the products are rounded to multiples of 2^-149 instead.
    magnitude, step = np.abs(w.astype(np.float64)), steps.astype(np.float64)
    best = np.abs(magnitude[..., None] - E2M1 * step[..., None]).min(-1)
    assert (np.abs(w.astype(np.float64) - values) <= best + 2.001 * 2.0**-24 * magnitude + 2.0**-149).all()


def unaligned(w):
    buffer = np.empty(w.nbytes + 1, dtype=np.uint8)
    view = buffer[1:].view(np.float32).reshape(w.shape)
    view[:] = w
    assert not view.flags.aligned
    return view


def read_only(w):
    w = w.copy()
    w.flags.writeable = False
    return w


STRIDES = {
    "transposed": lambda w: np.ascontiguousarray(w.T).T,
    "Fortran": np.asfortranarray,
    "every third row of a wider one": lambda w: np.pad(w, ((0, 0), (5, 7)), constant_values=np.nan).repeat(3, axis=0)[::3, 5:-7],
    "every second column": lambda w: w.repeat(2, axis=1)[:, ::2],
    "upside down": lambda w: np.ascontiguousarray(w[::-1])[::-1],
    "right to left": lambda w: np.ascontiguousarray(w[:, ::-1])[:, ::-1],
    "unaligned": unaligned,
    "big-endian": lambda w: w.astype(">f4"),
    "read-only": read_only,
    "nested lists": lambda w: w.astype(np.float64).tolist(),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("strides", STRIDES)
def test_strides_do_not_reach_the_bytes(format, strides):
    w = AWKWARD["heavy tails"]
    odd = STRIDES[strides](w)
    assert np.array_equal(odd, w)
    assert_same(mg.quantize(odd, format), mg.quantize(w, format))
    assert np.array_equal(mg.round_activations(odd, format), mg.quantize(w, format).dequantize())


def test_the_core_sees_aligned_numbers_alone():
    w = unaligned(AWKWARD["heavy tails"])
    assert as_float32(w, "weight").flags.aligned and as_float32(w.reshape(2, 12, 96), "x").flags.aligned  # x86 would forgive, other machines do not
    assert as_float32(AWKWARD["heavy tails"], "weight") is AWKWARD["heavy tails"]  # and nothing is copied that need not be


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(5, 96), (96, 96)])
def test_broadcast_axes_do_not_reach_the_bytes(format, shape):
    w = AWKWARD["heavy tails"]
    for odd in (np.broadcast_to(w[3], shape), np.broadcast_to(np.resize(w[:, :1], (shape[0], 1)), shape)):
        assert 0 in odd.strides
        assert_same(mg.quantize(odd, format), mg.quantize(odd.copy(), format))


BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32
NARROW = {
    "float64": (F32, lambda w: w.astype(np.float64) * (1 + 1e-12)),
    "big-endian float64": (F32, lambda w: w.astype(">f8")),
    "float16": (F16, lambda w: w),
    "big-endian float16": (F16, lambda w: w.astype(">f2")),
    "bfloat16": (BF16, lambda w: w),
    "bfloat16 bits": (BF16, lambda w: w.view(np.uint16)),
    "big-endian bfloat16 bits": (BF16, lambda w: w.view(np.uint16).astype(">u2")),
    "transposed bfloat16 bits": (BF16, lambda w: np.asfortranarray(w).view(np.uint16)),
    "BF16 tensor": (BF16, mg.StoredTensor.of),
    "F16 tensor": (F16, mg.StoredTensor.of),
    "F32 tensor": (F32, mg.StoredTensor.of),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", NARROW)
def test_every_dtype_is_widened_to_float32(format, kind):
    dtype, make = NARROW[kind]
    narrow = AWKWARD["heavy tails"].astype(dtype)
    array, keywords, wide = make(narrow), {"dtype": "bfloat16"} if "bits" in kind else {}, narrow.astype(np.float32)
    for search in SEARCHES[format]:
        assert_same(mg.quantize(array, format, scales=search, **keywords), mg.quantize(wide, format, scales=search))
    # A bfloat16 x has an activation rule of its own, which compressed-tensors' fake quantisation proves elsewhere; here all ways to hand it in must agree.
    expected = mg.round_activations(narrow if dtype is BF16 else wide, format)
    assert np.array_equal(mg.round_activations(array, format, **keywords), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_dequantize_reads_every_byte_as_ml_dtypes_does(format):
    rng = np.random.default_rng(7)
    group = mg.FORMATS[format].group_size
    scales = rng.permutation(256).astype(np.uint8).reshape(16, 16)  # NaN and negative scales too: a foreign file may hold them
    codes = rng.permuted(np.resize(np.arange(256, dtype=np.uint8), (16, 8 * group)), axis=1)
    for divisor in (1.0, 3.0, 1234.5):
        q = mg.QuantizedMatrix(format, codes, scales, divisor)
        with np.errstate(invalid="ignore", over="ignore"):
            expected = decoded_steps(q) * mg.unpack(codes).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        assert np.array_equal(q.dequantize(), expected, equal_nan=True)
        strided = mg.QuantizedMatrix(format, np.asfortranarray(codes), scales.repeat(2, axis=1)[:, ::2], divisor)
        assert np.array_equal(strided.dequantize(), expected, equal_nan=True)


def test_pack_and_unpack_are_inverse_and_put_the_even_column_low():
    packed = np.arange(256, dtype=np.uint8).reshape(4, 64)
    codes = mg.unpack(packed)
    assert np.array_equal(codes[:, 0::2], packed % 16) and np.array_equal(codes[:, 1::2], packed // 16)
    assert np.array_equal(mg.pack(codes), packed)
    assert np.array_equal(mg.pack(np.asfortranarray(codes)), packed)
    assert mg.pack(np.zeros((0, 4), dtype=np.uint8)).shape == (0, 2)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((2, 3), np.uint8), "codes has 3 columns; two share a byte"),
        (np.full((2, 2), 16, np.uint8), "codes holds 16; a code is 0 … 15"),
        (np.zeros((2, 2)), r"codes is float64 of shape \(2, 2\); it must be a uint8 matrix"),
        (np.zeros(4, np.uint8), r"codes is uint8 of shape \(4,\); it must be a uint8 matrix"),
    ],
)
def test_pack_refuses(codes, message):
    with pytest.raises(ValueError, match=message):
        mg.pack(codes)
    if "uint8" in message:
        with pytest.raises(ValueError, match=message.replace("codes", "packed")):
            mg.unpack(codes)


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize(("format", "search", "rule"), RULES)
def test_round_activations_is_quantize_and_dequantize(format, search, rule, name):
    x = AWKWARD[name]
    expected = mg.quantize(x, format, scales=search, mx_rule=rule).dequantize()
    assert np.array_equal(mg.round_activations(x, format, rule=search, mx_rule=rule), expected)
    if search == "absmax":
        assert np.array_equal(mg.round_activations(x, format, mx_rule=rule), expected)
        assert format == "nvfp4" or np.array_equal(mg.round_activations(x, format, rule=rule, mx_rule="ceil"), expected)  # a rule's own name wins, as it does in quantize
    in_place = x.copy()
    assert mg.round_activations(in_place, format, rule=search, mx_rule=rule, out=in_place) is in_place
    assert np.array_equal(in_place, expected)


@pytest.mark.parametrize("format", FORMATS)
def test_round_activations_takes_any_rank_any_output_and_a_given_divisor(format):
    x = AWKWARD["heavy tails"]
    expected = mg.round_activations(x, format)
    assert np.array_equal(mg.round_activations(x[0], format, tensor_scale=None if format == "mxfp4" else mg.nvfp4_tensor_scale(np.abs(x).max())), expected[0])
    assert np.array_equal(mg.round_activations(x.reshape(2, 3, 4, 96), format), expected.reshape(2, 3, 4, 96))
    assert np.array_equal(mg.round_activations(x.reshape(2, 12, 96).transpose(1, 0, 2), format), expected.reshape(2, 12, 96).transpose(1, 0, 2))
    upside_down = np.empty((24, 200), dtype=np.float32)[::-1, 7:103]
    assert np.array_equal(mg.round_activations(x, format, out=upside_down), expected)
    buffer = np.concatenate([x, x[:1]])
    mg.round_activations(buffer[:-1], format, out=buffer[1:])  # every row is written where the next one lies
    assert np.array_equal(buffer[1:], expected)
    if format == "nvfp4":
        given = mg.quantize(x, format, tensor_scale=77.7)
        assert given.tensor_scale == np.float32(77.7)
        assert np.array_equal(mg.round_activations(x, format, tensor_scale=77.7), given.dequantize())


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.empty((24, 95), np.float32), r"out is float32 of shape \(24, 95\); it must be a float32 array of shape \(24, 96\)"),
        (np.empty((24, 96)), "out is float64"),
        ([0.0], "out is list"),
        (np.empty((96, 24), np.float32).T, "out has strides .* columns must be adjacent"),
        (read_only(AWKWARD["heavy tails"]), "out is read-only"),
        (unaligned(AWKWARD["heavy tails"]), "out is not aligned"),
    ],
)
def test_round_activations_refuses_an_output_it_cannot_fill(out, message):
    with pytest.raises(ValueError, match=message):
        mg.round_activations(AWKWARD["heavy tails"], "nvfp4", out=out)


@pytest.mark.parametrize(("format", "search", "rule"), RULES)
def test_same_bytes_for_any_number_of_threads(format, search, rule):
    w = np.random.default_rng(8).standard_normal((131, 96)).astype(np.float32)
    one, rounded = mg.quantize(w, format, scales=search, mx_rule=rule, threads=1), mg.round_activations(w, format, rule=search, mx_rule=rule, threads=1)
    for threads in (2, 3, 8, 10**12):  # more than a C int, and than libgomp could start, is no reason to fail
        assert_same(mg.quantize(w, format, scales=search, mx_rule=rule, threads=threads), one)
        assert np.array_equal(mg.round_activations(w, format, rule=search, mx_rule=rule, threads=threads), rounded)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: mg.quantize(w, "nvfp4", tensor_scale=0), "tensor_scale is 0; it must be a positive finite number in float32"),
        (lambda w: mg.quantize(w, "nvfp4", tensor_scale=np.inf), "tensor_scale is inf; it must be a positive finite number"),
        (lambda w: mg.quantize(w, "nvfp4", tensor_scale=1e-37), "tensor_scale is 1e-37; 6 \\* 448 / tensor_scale.* overflows float32"),
        (lambda w: mg.quantize(w, "mxfp4", tensor_scale=3), "tensor_scale is 3; mxfp4 by the rule 'even' has 1"),
        (lambda w: mg.quantize(w, "mxfp4", scales="four-thirds", tensor_scale=1), "tensor_scale is 1; mxfp4 by the rule 'four-thirds' has 3"),
        (lambda w: mg.quantize(w, "nvfp4", scales="even"), "unknown scales for nvfp4 'even'; known: absmax, fpquant_mse, mse, four_over_six$"),
        (lambda w: mg.quantize(w, "nvfp4", scales="quest"), "unknown scales for nvfp4 'quest'; known: absmax, fpquant_mse, mse, four_over_six$"),
        (lambda w: mg.quantize(w, "mxfp4", scales="four_over_six"), "unknown scales for mxfp4 'four_over_six'; known: absmax, fpquant_mse, mse, quest, floor, ceil, even, four-thirds$"),
        (lambda w: mg.quantize(w, "mxfp4", scales="hessian"), "unknown scales for mxfp4 'hessian'; known: absmax, fpquant_mse, mse, quest, floor, ceil, even, four-thirds$"),
        (lambda w: mg.quantize(w, "nvfp4", scales="gptq"), "unknown scales for nvfp4 'gptq'; known: absmax, fpquant_mse, mse, four_over_six$"),
        (lambda w: mg.quantize(w, "mxfp4", scales="quest", mx_rule="four-thirds"), 'scales is "quest", which makes powers of two; mx_rule is "four-thirds": take another'),
        (lambda w: mg.round_activations(w, "mxfp4", rule="quest", mx_rule="four-thirds"), 'rule is "quest", which makes powers of two; mx_rule is "four-thirds": take another'),
        (lambda w: mg.round_activations(w, "mxfp4", rule="hessian_block"), "unknown rule for mxfp4 'hessian_block'; known: absmax, fpquant_mse, mse, quest, floor, ceil, even, four-thirds$"),
        (lambda w: mg.round_activations(w, "nvfp4", rule="even"), "unknown rule for nvfp4 'even'; known: absmax, fpquant_mse, mse, four_over_six$"),
        (lambda w: mg.alternating_tensor_scale([w], "gptq"), "unknown scales for nvfp4 'gptq'; known: absmax, fpquant_mse, mse, four_over_six$"),
        (lambda w: mg.alternating_tensor_scale([w, w[:, :95]]), "weights has 95 columns; nvfp4 needs a multiple of 16"),
        (lambda w: mg.alternating_tensor_scale([]), "weights is empty; at least one matrix is needed"),
        (lambda w: mg.round_activations(w, "mxfp4", mx_rule="round"), "unknown mx_rule 'round'; known: floor, ceil, even, four-thirds"),
        (lambda w: mg.round_activations(w, "fp4"), "unknown format 'fp4'; known: mxfp4, nvfp4"),
        (lambda w: mg.round_activations(w[:, :95], "nvfp4"), "x has 95 columns; nvfp4 needs a multiple of 16"),
        (lambda w: mg.nvfp4_tensor_scale(-1.0), "amax is -1.0; it must be a finite number in float32, 0 or more"),
        (lambda w: mg.nvfp4_tensor_scale(np.nan), "amax is nan; it must be a finite number"),
    ],
)
def test_what_no_rule_can_mean_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(AWKWARD["heavy tails"])


# ---- A rotation in the same pass


@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("k", [2, 16, 32, 96 // 3])
def test_rotating_in_the_same_pass_gives_the_bytes_of_two(format, k, search):
    w, rotation = AWKWARD["heavy tails"], mg.Hadamard(k)
    two = mg.quantize(reference.rotate(w, k), format, scales=search)
    one = mg.quantize(w, format, scales=search, rotation=rotation)
    assert_same(one, two)
    assert one.rotation == rotation and two.rotation == mg.Identity()
    assert one.report.weight_error == two.report.weight_error and one.report.scale_offsets == two.report.scale_offsets
    assert np.abs(one.dequantize(unrotate=True) - w).max() < 0.5 * np.abs(w).max()
    kept = w.copy()
    rounded = mg.round_activations(w, format, rule=search, rotation=rotation)
    assert np.array_equal(rounded, two.dequantize()) and np.array_equal(w, kept)
    assert mg.round_activations(kept, format, rule=search, rotation=rotation, out=kept) is kept
    assert np.array_equal(kept, rounded)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_finite_is_named_and_nothing_of_the_callers_is_written(format):
    w = AWKWARD["heavy tails"].copy()
    w[20, 3], w[5, 70] = np.inf, np.nan
    out, kept = np.full_like(w, 7), w.copy()
    divisor = None if format == "mxfp4" else 100.0
    for rotation in (None, mg.Hadamard(32)):
        for tensor_scale in (None, divisor):
            with pytest.raises(ValueError, match="weight is nan at row 5, column 70; every value must be finite"):
                mg.quantize(w, format, tensor_scale=tensor_scale, rotation=rotation)
            for target in (None, out, w):
                with pytest.raises(ValueError, match="x is nan at row 5, column 70; every value must be finite"):
                    mg.round_activations(w, format, tensor_scale=tensor_scale, rotation=rotation, out=target)
        with pytest.raises(ValueError, match=r"x is nan at index \(1, 1, 70\)"):
            mg.round_activations(w.reshape(6, 4, 96), format, rotation=rotation)
    assert (out == 7).all() and np.array_equal(w, kept, equal_nan=True)
    with pytest.raises(ValueError, match="x is nan at row 5, column 70"):
        mg.Hadamard(16).apply(w)
    huge = np.full((3, 96), 0.9 * FLT_MAX, dtype=np.float32)
    with pytest.raises(ValueError, match="row 0 overflows float32 when it is rotated by blocks of 32"):
        mg.quantize(huge, format, rotation=mg.Hadamard(32))


def test_a_rotation_that_is_none_or_does_not_fit_is_refused():
    w = AWKWARD["heavy tails"]
    with pytest.raises(TypeError, match="rotation is 32; it must be None or a rotation such as Hadamard"):
        mg.quantize(w, rotation=32)
    with pytest.raises(ValueError, match="weight has 96 columns; a rotation of block size 64 needs a multiple of it"):
        mg.quantize(w, rotation=mg.Hadamard(64))
    with pytest.raises(ValueError, match="x has 96 columns; a rotation of block size 64 needs a multiple of it"):
        mg.round_activations(w, "mxfp4", rotation=mg.Hadamard(64))
    assert_same(mg.quantize(w, rotation=mg.Identity()), mg.quantize(w))


def test_dequantize_fills_an_array_that_is_given():
    q = mg.quantize(AWKWARD["heavy tails"])
    out = np.empty((24, 200), dtype=np.float32)[:, 7:103]
    assert q.dequantize(out) is out and np.array_equal(out, q.dequantize())
    with pytest.raises(ValueError, match=r"out is float32 of shape \(24, 95\); it must be a float32 array of shape \(24, 96\)"):
        q.dequantize(np.empty((24, 95), np.float32))
