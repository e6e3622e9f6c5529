"""Products with packed weights against float64 products of the values they stand for."""

import ml_dtypes
import numpy as np
import pytest

import mrgptq as mg

U32 = 2.0**-24
FORMATS = ("nvfp4", "mxfp4")
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
FLOAT32_MAX = float(np.finfo(np.float32).max)


def weight(rows, cols, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_t(4, (rows, cols)) * np.exp2(rng.integers(-3, 4, (rows, 1)))).astype(np.float32)


def inputs(*shape, seed=1):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp2(rng.integers(-6, 7, (*shape[:-1], 1)))).astype(np.float32)


def assert_is_product(y, x, values):
    """As mg.matmul's docstring says. On its way a product is rounded with the chain of its group, 32 products at most, with that of its 128 columns, 8 groups at most (4 of 32 columns), and with the sum of
    chunks; where nothing fuses once more in either chain; and the value once. Steps and values below float32's normal range are off by 2^-150 at most, of which twelve times may count, and groups by as much."""
    wide, w = x.astype(np.float64), values.astype(np.float64)
    n = 40 + -(-x.shape[-1] // 128)
    bound = n * U32 / (1 - n * U32) * (np.abs(wide) @ np.abs(w).T) + 2.0**-146 * np.abs(wide).sum(axis=-1, keepdims=True) + x.shape[-1] / 16 * 2.0**-150
    assert y.dtype == np.float32 and y.shape == (*x.shape[:-1], len(w))
    assert (np.abs(y - wide @ w.T) <= bound).all()


@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 33, 515])
@pytest.mark.parametrize(("rows", "cols"), [(1, 32), (31, 96), (32, 128), (33, 160), (70, 384), (100, 1056)])
@pytest.mark.parametrize("format", FORMATS)
def test_is_the_product_with_the_dequantised_weight(format, rows, cols, tokens):
    q, x = mg.quantize(weight(rows, cols), format), inputs(tokens, cols)
    y = mg.matmul(x, q)
    assert_is_product(y, x, q.dequantize())
    for threads in (1, 2, 3):
        assert mg.matmul(x, q, threads=threads).tobytes() == y.tobytes()


@pytest.mark.parametrize("format", FORMATS)
def test_a_token_is_answered_alike_in_any_company(format):
    q, x = mg.quantize(weight(45, 288), format), inputs(600, 288)
    y = mg.matmul(x, q)
    for chosen in ([5], [599, 3], list(range(520, 531)), list(range(100, 400))):
        assert np.array_equal(mg.matmul(x[chosen], q), y[chosen])


@pytest.mark.parametrize("format", FORMATS)
def test_every_code_and_every_scale_is_read(format):
    """One input at a time, so that each answer is one value of the weight, exactly; 16 codes in each of the places a word has, and every scale that the formats store."""
    rng = np.random.default_rng(0)
    group, scales = mg.FORMATS[format].group_size, np.arange(1, 127 if format == "nvfp4" else 252, dtype=np.uint8)
    codes = rng.integers(0, 16, (len(scales), 8 * group), dtype=np.uint8)
    codes[:, :16] = np.arange(16)
    q = mg.QuantizedMatrix(format, mg.pack(codes), np.repeat(scales[:, None], 8, axis=1), 3.0)
    y, values = mg.matmul(np.eye(8 * group, dtype=np.float32), q).T, q.dequantize()
    halved = np.abs(values).max(axis=1) >= 6 * 2.0**-125  # steps whose half is no subnormal number
    assert halved.sum() >= len(scales) - 3 and np.array_equal(y[halved], values[halved])
    assert (np.abs(y.astype(np.float64) - values)[~halved] <= 13 * 2.0**-150 + 2 * U32 * np.abs(values[~halved])).all()


def test_the_weight_is_that_of_the_original_basis():
    w, x = weight(40, 256), inputs(9, 256)
    by_matrix = mg.Dense(np.random.default_rng(0).standard_normal((16, 16)))  # not orthogonal: inputs are turned otherwise than the weight
    for rotation in (mg.Hadamard(32), by_matrix):
        q = mg.quantize(w, "mxfp4", rotation=rotation)
        assert_is_product(mg.matmul(x, q), rotation.dual.apply(x), q.dequantize())
    condition = np.linalg.cond(by_matrix.matrix.astype(np.float64))
    assert condition < 100
    # Inverses rounded to float32, products of 16 and those of assert_is_product: some 60 u of the norms, times the condition of what stands between.
    norms = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(q.dequantize(unrotate=True), axis=1)
    assert (np.abs(mg.matmul(x, q) - x.astype(np.float64) @ q.dequantize(unrotate=True).astype(np.float64).T) <= 2 * condition * 60 * U32 * norms).all()
    q = mg.quantize(w, "nvfp4", rotation=mg.Hadamard(16))
    # Both the turned x and the turned-back weight are off by less than 6 u of a row's norm: log2(16) butterflies, the factor and its product, as in test_rotations.
    apart = np.abs(mg.matmul(x, q) - x.astype(np.float64) @ q.dequantize(unrotate=True).astype(np.float64).T)
    norms = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(q.dequantize(), axis=1)
    assert (apart <= (2 * 6.1 + 42) * U32 * norms).all()


def test_any_rank_dtype_and_output():
    q, x = mg.quantize(weight(40, 96), "nvfp4"), inputs(2, 3, 96)
    y = mg.matmul(x, q)
    assert y.shape == (2, 3, 40) and np.array_equal(y.reshape(6, 40), mg.matmul(x.reshape(6, 96), q)) and np.array_equal(mg.matmul(x[1, 2], q), y[1, 2])
    assert np.array_equal(mg.matmul(np.asfortranarray(x[0]), q), y[0]) and np.array_equal(mg.matmul(x.astype(np.float64), q), y)
    narrow = x.astype(ml_dtypes.bfloat16)
    assert np.array_equal(mg.matmul(narrow, q), mg.matmul(narrow.astype(np.float32), q)) and np.array_equal(mg.matmul(narrow.view(np.uint16), q, dtype="bfloat16"), mg.matmul(narrow, q))
    out = np.full((6, 80), 7, np.float32)
    assert mg.matmul(x.reshape(6, 96), q, out=out[:, 20:60]).base is out and np.array_equal(out[:, 20:60], y.reshape(6, 40)) and (out[:, :20] == 7).all() and (out[:, 60:] == 7).all()
    buffer = np.zeros((6, 96), np.float32)
    buffer[:] = x.reshape(6, 96)
    mg.matmul(buffer, q, out=buffer[:, :40])  # over its own input
    assert np.array_equal(buffer[:, :40], y.reshape(6, 40))
    long = inputs(700, 96)
    expected = mg.matmul(long[:600].copy(), q)
    assert np.array_equal(mg.matmul(long[:600], q, out=long[100:, :40]), expected)  # over inputs that are read after others have been answered


def test_subnormal_inputs_count():
    q = mg.quantize(np.ones((3, 32), np.float32), "mxfp4")
    x = np.full((2, 32), 2.0**-149, np.float32)
    assert np.array_equal(mg.matmul(x, q), np.full((2, 3), 32 * 2.0**-149, np.float32))
    halves = mg.QuantizedMatrix("mxfp4", mg.pack(np.full((3, 32), 1, np.uint8)), np.full((3, 1), 127 + 10, np.uint8), 1.0)  # of the step, 2^10: half of the input would be lost
    assert np.array_equal(mg.matmul(x, halves), np.full((2, 3), 32 * 2.0**-140, np.float32))


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_inputs_up_to_2_to_the_119_are_safe(tokens):
    q = mg.QuantizedMatrix("mxfp4", mg.pack(np.full((3, 32), 7, np.uint8)), np.full((3, 1), 100, np.uint8), 1.0)
    x = np.full((tokens, 32), 2.0**119, np.float32)
    assert np.array_equal(mg.matmul(x, q), np.full((tokens, 3), 192 * 2.0**92, np.float32))


def test_zeros_and_extremes():
    largest = np.full((2, 64), 6 * 2.0**110, np.float32)
    q = mg.quantize(largest, "mxfp4")
    assert np.array_equal(mg.matmul(np.ones((1, 64), np.float32), q), np.full((1, 2), 64 * 6 * 2.0**110, np.float32))
    assert not mg.matmul(inputs(3, 64), mg.quantize(np.zeros((5, 64), np.float32), "nvfp4")).any()


# ---- Inputs that are rounded: the definition, in float32 and in whole numbers


def doubled_codes(q):
    """Twice the values of the codes, whole numbers."""
    return (2 * E2M1[mg.unpack(q.codes)]).astype(np.int64)


def relative_scales(q):
    """The scales that the sums are weighed by, float32, and what a row's sums are multiplied by for it: powers of two are taken relative to the largest of their row, which becomes 2^45."""
    if q.format == "nvfp4":
        return q.scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32), np.ones(len(q.scales))
    largest = q.scales.max(axis=1).astype(int)
    below = largest[:, None] - q.scales
    return np.where(q.scales == 255, np.nan, np.where(below > 108, 0, np.exp2(45.0 - below))).astype(np.float32), np.exp2(largest - 127.0 - 45)


def rounded_to_bytes(x, group):
    """8-bit inputs: whole numbers, their steps relative to a power of two, such that the largest lies from 2^45 to 2^46, these powers, and the steps."""
    groups = x.reshape(len(x), -1, group)
    steps = np.abs(groups).max(axis=2) / np.float32(127)
    whole = np.clip(np.rint(groups / np.where(steps == 0, np.float32(1), steps)[..., None]), -127, 127).astype(np.int64)
    largest = steps.max(axis=1).astype(np.float64)
    powers = np.exp2(np.frexp(np.where(largest == 0, 1, largest))[1] - 1.0 - 45)
    relative = steps / powers[:, None]
    return whole.reshape(x.shape), np.where(relative < 2.0**-63, 0, relative).astype(np.float32), powers, steps


def product_by_definition(b, t, b_powers, q, constant):
    """Group after group; b (tokens, cols) whole numbers, t (tokens, groups) float32, ``constant`` what all elements share."""
    a, (s, a_powers) = doubled_codes(q), relative_scales(q)
    groups = max(t.shape[1], s.shape[1])
    size, t, s = a.shape[1] // groups, np.repeat(t, groups // t.shape[1], axis=1), np.repeat(s, groups // s.shape[1], axis=1)
    sums = np.zeros((len(b), len(a)), np.float32)
    for g in range(groups):
        columns = slice(g * size, (g + 1) * size)
        whole = (b[:, columns] @ a[:, columns].T).astype(np.float32)
        sums += whole * (t[:, g, None] * s[None, :, g])
    return (sums * (constant * b_powers[:, None] * a_powers[None, :])).astype(np.float32)


def packed_by_definition(x, q):
    t, powers = relative_scales(x)
    return product_by_definition(doubled_codes(x), t, powers, q, 0.25 / (x.tensor_scale * q.tensor_scale))


def bytes_by_definition(x, q):
    whole, t, powers, _ = rounded_to_bytes(x, mg.FORMATS[q.format].group_size)
    return product_by_definition(whole, t, powers, q, 0.5 / q.tensor_scale)


def values_of(q):
    """The values of codes and scales in float64, exact but for the tensor scale's division, and the largest step of each row."""
    steps = (q.scales.view(ml_dtypes.float8_e4m3fn).astype(float) if q.format == "nvfp4" else np.exp2(q.scales - 127.0)) / q.tensor_scale
    return doubled_codes(q) / 2 * np.repeat(steps, mg.FORMATS[q.format].group_size, axis=1), steps.max(axis=1)


def assert_is_rounded_product(y, b, b_steps, q, n):
    """n roundings: m - 1 additions, one at the end, with 8-bit inputs two of each group's product, and one more that covers the factor's in float64. What counts as zero is less than 127 times 2^-108 of
    the largest step; a subnormal result errs by half the smallest one."""
    w, steps = values_of(q)
    bound = n * U32 / (1 - n * U32) * (np.abs(b) @ np.abs(w).T) + 2.0**-101 * (b_steps[:, None] * np.abs(w).sum(axis=1) + np.abs(b).sum(axis=1)[:, None] * steps) + 2.0**-150
    exact = b @ w.T
    assert y.dtype == np.float32 and y.shape == exact.shape
    with np.errstate(over="ignore"):  # where the product may overflow, so may y
        assert (((exact - bound).astype(np.float32) <= y) & (y <= (exact + bound).astype(np.float32))).all()


def random_blocks(format, rows, cols, scales, seed, tensor_scale=1.0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (rows, cols // 2), dtype=np.uint8)
    return mg.QuantizedMatrix(format, codes, rng.integers(*scales, (rows, cols // mg.FORMATS[format].group_size)).astype(np.uint8), tensor_scale)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 13, 515])
@pytest.mark.parametrize(("rows", "cols"), [(1, 32), (31, 96), (32, 128), (33, 544), (70, 1056)])
@pytest.mark.parametrize("inputs_are", FORMATS)
@pytest.mark.parametrize("format", FORMATS)
def test_packed_operands_are_multiplied_as_defined(format, inputs_are, rows, cols, tokens):
    q, x = mg.quantize(weight(rows, cols), format), mg.quantize_activations(inputs(tokens, cols), inputs_are)
    y = mg.matmul(x, q)
    assert np.array_equal(y, packed_by_definition(x, q))
    m = cols // min(mg.FORMATS[f].group_size for f in (format, inputs_are))
    b, b_steps = values_of(x)
    assert_is_rounded_product(y, b, b_steps, q, m + 1)
    # dequantize() rounds each operand's step and its product with the code.
    wide, w = x.dequantize().astype(np.float64), q.dequantize().astype(np.float64)
    assert (np.abs(y - wide @ w.T) <= 1.01 * (m + 5) * U32 * (np.abs(wide) @ np.abs(w).T)).all()
    for threads in (1, 2, 3):
        assert mg.matmul(x, q, threads=threads).tobytes() == y.tobytes()


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 13, 515])
@pytest.mark.parametrize(("rows", "cols"), [(1, 32), (31, 96), (32, 128), (33, 544), (70, 1056)])
@pytest.mark.parametrize("format", FORMATS)
def test_inputs_of_eight_bits_are_multiplied_as_defined(format, rows, cols, tokens):
    q, x = mg.quantize(weight(rows, cols), format), inputs(tokens, cols)
    y = mg.matmul(x, q, activations="int8")
    assert np.array_equal(y, bytes_by_definition(x, q))
    group = mg.FORMATS[format].group_size
    whole, _, _, steps = rounded_to_bytes(x, group)
    assert_is_rounded_product(y, whole * np.repeat(steps.astype(float), group, axis=1), steps.max(axis=1), q, cols // group + 3)
    # An input is off by half a step at most, and by what dividing and multiplying by the step round.
    w = np.abs(values_of(q)[0])
    apart = np.abs(y - x.astype(np.float64) @ values_of(q)[0].T)
    assert (apart <= np.repeat(0.5001 * steps.astype(float), group, axis=1) @ w.T + 1e-5 * (np.abs(x) @ w.T)).all()
    for threads in (1, 2, 3):
        assert mg.matmul(x, q, activations="int8", threads=threads).tobytes() == y.tobytes()


@pytest.mark.parametrize("activations", [*FORMATS, "int8"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_rounded_token_is_answered_alike_in_any_company(format, activations):
    q, x = mg.quantize(weight(45, 288), format), inputs(600, 288)
    if activations == "nvfp4":
        activations = mg.Activations("nvfp4", tensor_scale=50.0)
    y = mg.matmul(x, q, activations=activations)
    for chosen in ([5], [599, 3], list(range(520, 531)), list(range(100, 400))):
        assert np.array_equal(mg.matmul(x[chosen], q, activations=activations), y[chosen])


@pytest.mark.parametrize("cols", [16, 32, 544])
def test_sums_of_the_largest_codes_are_exact(cols):
    """Every product of a group at its end: 32 of 12 * 12 or 12 * 127, all of one sign, in turn, and in pairs; the sums fit float32, so nothing may be rounded."""
    codes = np.array([[7], [15], [7, 15], [15, 7, 7], [7, 7, 15, 15], [0], [1, 14]], dtype=object)
    rows = np.stack([np.resize(np.array(row, np.uint8), cols) for row in codes])
    for format in FORMATS if cols % 32 == 0 else ("nvfp4",):
        group, one = mg.FORMATS[format].group_size, 0x38 if format == "nvfp4" else 127
        q = mg.QuantizedMatrix(format, mg.pack(rows), np.full((len(rows), cols // group), one, np.uint8), 1.0)
        values = q.dequantize()
        assert np.array_equal(mg.matmul(q, q), values @ values.T) and np.abs(values @ values.T).max() == 36 * cols
        x = 127 * np.sign(values)
        x[:, ::group] = 127  # every group's step is 1
        assert np.array_equal(mg.matmul(x, q, activations="int8"), x @ values.T)


@pytest.mark.parametrize("inputs_are", FORMATS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_code_meets_every_code_under_every_scale(format, inputs_are):
    """All bytes of codes and all scales that are numbers, whole rows of them far apart and rows in which large and small ones meet."""
    ends = {"nvfp4": [(1, 127), (1, 8)], "mxfp4": [(0, 255), (0, 8), (247, 255), (100, 150)]}
    for spread in ends[format]:
        for x_spread in ends[inputs_are]:
            for tensor_scale in (1.0, 2.0**-66, 1.5 * 2.0**83):
                q = random_blocks(format, 40, 544, spread, 1, tensor_scale)
                x = random_blocks(inputs_are, 9, 544, x_spread, 2)
                with np.errstate(over="ignore"):
                    y = mg.matmul(x, q)
                    assert np.array_equal(y, packed_by_definition(x, q))
                b, b_steps = values_of(x)
                assert_is_rounded_product(y, b, b_steps, q, 544 // 16 + 1)


def test_scales_that_are_no_numbers_make_none():
    for format, byte in (("nvfp4", 127), ("mxfp4", 255)):
        q = random_blocks(format, 40, 96, (100, 120), 1)
        q.scales[7, 1] = byte
        for activations in (*FORMATS, "int8"):
            y = mg.matmul(inputs(5, 96), q, activations=activations)
            assert np.isnan(y[:, 7]).all() and np.isfinite(np.delete(y, 7, axis=1)).all()


@pytest.mark.parametrize("format", FORMATS)
def test_eight_bits_from_end_to_end_of_float32(format):
    """Subnormal and huge inputs, groups of zeros, tokens of zeros, and groups too far below their token's largest to count."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((12, 128)) * np.exp2(rng.integers(-149, 120, (12, 4)).repeat(32, axis=1).astype(float))).astype(np.float32)
    x[1], x[2, 32:] = 0, 0
    x[3] = np.ldexp(rng.integers(-300, 300, 128), -149)  # steps of 0 to 2 of the smallest numbers
    x[4] = np.float32(2.0**-149)
    x[5] = np.where(rng.random(128) < 0.5, FLOAT32_MAX, -FLOAT32_MAX)
    q = mg.quantize(weight(40, 128) * np.float32(1e-3), format)
    with np.errstate(over="ignore"):
        y = mg.matmul(x, q, activations="int8")
        assert np.array_equal(y, bytes_by_definition(x, q))
    group = mg.FORMATS[format].group_size
    whole, _, _, steps = rounded_to_bytes(x, group)
    assert_is_rounded_product(y, whole * np.repeat(steps.astype(float), group, axis=1), steps.max(axis=1), q, 128 // group + 3)
    assert not y[1].any()


def test_a_checkpoints_activations_are_carried_out():
    """Names, an Activations and inputs rounded beforehand are one thing: the product of what round_activations leaves, which test_activations compares with compressed-tensors."""
    x, w = inputs(2, 3, 256), weight(40, 256)
    for rotation in (None, mg.Hadamard(16), mg.Dense(np.random.default_rng(0).standard_normal((16, 16)))):
        for format in FORMATS:
            q = mg.quantize(w, format, rotation=rotation)
            turn = q.rotation.dual
            for activations in (mg.Activations("nvfp4", tensor_scale=100.0), mg.Activations("nvfp4"), mg.Activations("mxfp4", rule="mse"), mg.Activations("mxfp4", "four-thirds"), mg.Activations("mxfp4", rule="quest")):
                options = {"rule": activations.rule, "mx_rule": activations.mx_rule, "tensor_scale": activations.tensor_scale, "rotation": turn}
                packed = mg.quantize_activations(x, activations.format, **options)
                y = mg.matmul(x, q, activations=activations)
                assert y.shape == (2, 3, 40) and np.array_equal(y.reshape(6, 40), mg.matmul(packed, q))
                # Steps and products with codes are rounded in both, at most 16 groups' sums and 256 products in chains.
                values, wide = mg.round_activations(x, activations.format, **options).reshape(6, 256).astype(np.float64), q.dequantize().astype(np.float64)
                assert (np.abs(y.reshape(6, 40) - values @ wide.T) <= 22 * U32 * (np.abs(values) @ np.abs(wide).T)).all()
            for name in FORMATS:
                assert np.array_equal(mg.matmul(x, q, activations=name), mg.matmul(x, q, activations=mg.Activations(name)))
            assert np.array_equal(mg.matmul(x, q, activations="int8"), mg.matmul(turn.apply(x), mg.QuantizedMatrix(format, q.codes, q.scales, q.tensor_scale), activations="int8"))
    narrow = x.astype(ml_dtypes.bfloat16)
    q = mg.quantize(w, "nvfp4")
    assert np.array_equal(mg.matmul(narrow, q, activations="nvfp4").reshape(6, 40), mg.matmul(mg.quantize_activations(narrow, "nvfp4"), q))  # amax / 6 in bfloat16
    assert np.array_equal(mg.matmul(narrow.view(np.uint16), q, dtype="bfloat16", activations="nvfp4"), mg.matmul(narrow, q, activations="nvfp4"))
    turned = mg.quantize(w, "mxfp4", rotation=mg.Dense(np.random.default_rng(1).standard_normal((32, 32))))
    assert mg.matmul(mg.quantize_activations(x, "mxfp4", rotation=turned.rotation.dual), turned).shape == (6, 40)


def test_outputs_over_rounded_inputs():
    q = mg.quantize(weight(40, 96), "nvfp4")
    for activations in ("mxfp4", "int8"):
        for count, rows in ((6, slice(0, 6)), (600, slice(100, 700))):
            buffer = inputs(700, 96)
            expected = mg.matmul(buffer[:count].copy(), q, activations=activations)
            assert mg.matmul(buffer[:count], q, activations=activations, out=buffer[rows, :40]).base is buffer and np.array_equal(buffer[rows, :40], expected)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda x, q: mg.matmul(x, q, activations="int4"), ValueError, "unknown activations 'int4'; known: mxfp4, nvfp4, int8"),
        (lambda x, q: mg.matmul(x, q, activations=8), TypeError, "activations is int; it must be None, a name or an Activations"),
        (lambda x, q: mg.matmul(x[:, :64], q, activations="int8"), ValueError, "x has 64 columns; the weight has 96"),
        (lambda x, q: mg.matmul(x[:, :64], q, activations="mxfp4"), ValueError, "x has 64 columns; the weight has 96"),
        (lambda x, q: mg.matmul(np.where(x == x[2, 5], np.nan, x), q, activations="int8"), ValueError, "x is nan at row 2, column 5; every value must be finite"),
        (lambda x, q: mg.matmul(np.where(x == x[2, 5], np.inf, x), q, activations="nvfp4"), ValueError, "x is inf at row 2, column 5"),
        (lambda x, q: mg.matmul(mg.quantize_activations(x, "nvfp4"), q, activations="nvfp4"), TypeError, "x is a QuantizedMatrix, rounded already"),
        (lambda x, q: mg.matmul(mg.quantize_activations(x, "nvfp4"), q, dtype="bfloat16"), TypeError, "x is a QuantizedMatrix, rounded already"),
        (lambda x, q: mg.matmul(mg.quantize_activations(x, "nvfp4", rotation=mg.Hadamard(16)), q), ValueError, r"x is in the basis of Hadamard\(16\); q, in that of Identity\(\), needs Identity\(\)"),
        (lambda x, q: mg.matmul(mg.quantize_activations(x[:, :64], "nvfp4"), q), ValueError, "x has 64 columns; the weight has 96"),
        (lambda x, q: mg.matmul(x, q, activations="int8", out=np.empty((4, 39), np.float32)), ValueError, r"out is float32 of shape \(4, 39\)"),
        (lambda x, q: mg.matmul(x, q, activations="mxfp4", threads=0), ValueError, "threads is 0"),
    ],
)
def test_refusals_of_roundings(call, kind, message):
    with pytest.raises(kind, match=message):
        call(inputs(4, 96), mg.quantize(weight(40, 96), "nvfp4"))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda x, q: mg.matmul(x[:, :64], q), ValueError, "x has 64 columns; the weight has 96"),
        (lambda x, q: mg.matmul(np.where(x == x[2, 5], np.nan, x), q), ValueError, "x is nan at row 2, column 5; every value must be finite"),
        (lambda x, q: mg.matmul(np.where(x == x[2, 5], -np.inf, x), q), ValueError, "x is -inf at row 2, column 5"),
        (lambda x, q: mg.matmul(x, q.dequantize()), TypeError, "q is ndarray; it must be a QuantizedMatrix"),
        (lambda x, q: mg.matmul(x.astype(int), q), TypeError, "x has dtype int64"),
        (lambda x, q: mg.matmul(x, q, out=np.empty((4, 39), np.float32)), ValueError, r"out is float32 of shape \(4, 39\); it must be a float32 array of shape \(4, 40\)"),
        (lambda x, q: mg.matmul(x, q, threads=0), ValueError, "threads is 0"),
    ],
)
def test_refusals(call, kind, message):
    with pytest.raises(kind, match=message):
        call(inputs(4, 96), mg.quantize(weight(40, 96), "nvfp4"))


def test_a_quantised_layer_answers_nearly_as_the_layer():
    """End to end: GPTQ's codes, their product and the error that the report states."""
    w, x = weight(64, 128), inputs(512, 128)
    hessian = mg.Hessian(128)
    hessian.update(x)
    q = mg.quantize_layer(w, hessian, "mr-gptq")
    apart = mg.matmul(x, q) - x.astype(np.float64) @ w.astype(np.float64).T
    energy = np.square(x.astype(np.float64) @ w.astype(np.float64).T).sum()
    assert np.square(apart).sum() / energy == pytest.approx(q.report.relative_error, rel=1e-3)  # H is float32's, and so is the product: 1e-5 of an error of 1e-2
