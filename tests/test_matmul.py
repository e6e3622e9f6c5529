"""Products with packed weights against float64 products of the values they stand for."""

import ml_dtypes
import numpy as np
import pytest

import mrgptq as mg

U32 = 2.0**-24
FORMATS = ("nvfp4", "mxfp4")


def weight(rows, cols, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_t(4, (rows, cols)) * np.exp2(rng.integers(-3, 4, (rows, 1)))).astype(np.float32)


def inputs(*shape, seed=1):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp2(rng.integers(-6, 7, (*shape[:-1], 1)))).astype(np.float32)


def assert_is_product(y, x, values):
    """Chains of 128 products in float32, each product and each sum rounded once at most, added one after the other: gamma_n, n = 128 + chains, of the sum of magnitudes; sums of subnormal products
    err by half the smallest subnormal each."""
    wide, w = x.astype(np.float64), values.astype(np.float64)
    n = 128 + -(-x.shape[-1] // 128)
    bound = n * U32 / (1 - n * U32) * (np.abs(wide) @ np.abs(w).T) + x.shape[-1] * 2.0**-150
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
    assert np.array_equal(mg.matmul(np.eye(8 * group, dtype=np.float32), q), q.dequantize().T)


def test_the_weight_is_that_of_the_original_basis():
    w, x = weight(40, 256), inputs(9, 256)
    by_matrix = mg.Dense(np.random.default_rng(0).standard_normal((16, 16)))  # not orthogonal: inputs are turned otherwise than the weight
    for rotation in (mg.Hadamard(32), by_matrix):
        q = mg.quantize(w, "mxfp4", rotation=rotation)
        assert_is_product(mg.matmul(x, q), rotation.dual.apply(x), q.dequantize())
    condition = np.linalg.cond(by_matrix.matrix.astype(np.float64))
    assert condition < 100
    # Inverses rounded to float32, products of 16 and chains of 128: some 150 u of the norms, times the condition of what stands between.
    norms = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(q.dequantize(unrotate=True), axis=1)
    assert (np.abs(mg.matmul(x, q) - x.astype(np.float64) @ q.dequantize(unrotate=True).astype(np.float64).T) <= 2 * condition * 150 * U32 * norms).all()
    q = mg.quantize(w, "nvfp4", rotation=mg.Hadamard(16))
    # Both the turned x and the turned-back weight are off by less than 6 u of a row's norm: log2(16) butterflies, the factor and its product, as in test_rotations.
    apart = np.abs(mg.matmul(x, q) - x.astype(np.float64) @ q.dequantize(unrotate=True).astype(np.float64).T)
    norms = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(q.dequantize(), axis=1)
    assert (apart <= (2 * 6.1 + 131) * U32 * norms).all()


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


def test_zeros_and_extremes():
    largest = np.full((2, 64), 6 * 2.0**110, np.float32)
    q = mg.quantize(largest, "mxfp4")
    assert np.array_equal(mg.matmul(np.ones((1, 64), np.float32), q), np.full((1, 2), 64 * 6 * 2.0**110, np.float32))
    assert not mg.matmul(inputs(3, 64), mg.quantize(np.zeros((5, 64), np.float32), "nvfp4")).any()


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
