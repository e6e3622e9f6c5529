"""StoredTensor against ml_dtypes, which defines what the bits of the small floats mean."""

import ml_dtypes
import numpy as np
import pytest

from mrgptq.checkpoint.stored_tensor import StoredTensor

SMALL_FLOATS = {
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
NATIVE = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "F16": "float16", "U32": "uint32", "I32": "int32",
    "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64",
}  # fmt: skip


def all_patterns(dtype):
    bits = np.dtype(f"u{np.dtype(SMALL_FLOATS[dtype]).itemsize}")
    return np.arange(2 ** (8 * bits.itemsize)).astype(bits)


def assert_same_floats(actual, expected):
    """Equal bit for bit, except that a NaN may be any NaN."""
    assert actual.dtype == expected.dtype == np.float32
    assert actual.shape == expected.shape
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(actual), nan)
    assert np.array_equal(actual.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


@pytest.mark.parametrize("dtype", SMALL_FLOATS)
def test_every_pattern_widens_to_the_value_ml_dtypes_gives_it(dtype):
    bits = all_patterns(dtype)
    expected = bits.view(SMALL_FLOATS[dtype]).astype(np.float32)
    assert np.isnan(expected).any()
    assert_same_floats(np.asarray(StoredTensor.from_bits(dtype, bits)), expected)


@pytest.mark.parametrize("dtype", SMALL_FLOATS)
def test_ml_dtypes_arrays_keep_their_bits(dtype):
    bits = all_patterns(dtype).reshape(16, -1)[:, ::-3]
    array = bits.view(SMALL_FLOATS[dtype])
    stored = StoredTensor.of(array)
    assert (stored.dtype, stored.shape) == (dtype, bits.shape)
    assert np.array_equal(stored.bits, bits)
    assert_same_floats(np.asarray(stored), array.astype(np.float32))
    assert np.shares_memory(stored.bits, array)


def test_float4_is_packed_in_pairs_with_the_even_element_low():
    codes = np.stack(np.divmod(np.arange(256), 16)[::-1], axis=-1).astype(np.uint8)  # row b holds the low and the high nibble of b
    array = codes.view(ml_dtypes.float4_e2m1fn)
    stored = StoredTensor.of(array)
    assert (stored.dtype, stored.shape, stored.nbytes) == ("F4", (256, 2), 256)
    assert np.array_equal(stored.bits, np.arange(256)[:, None])
    assert_same_floats(np.asarray(stored), array.astype(np.float32))
    assert np.array_equal(StoredTensor.from_bits("F4", np.array([0x21, 0xF8], np.uint8)), [0.5, 1.0, -0.0, -6.0])
    assert_same_floats(np.asarray(StoredTensor.of(array.reshape(4, 128).T)), array.reshape(4, 128).T.astype(np.float32))


@pytest.mark.parametrize("dtype", NATIVE)
def test_native_arrays_of_any_stride_and_byte_order(dtype):
    base = np.random.default_rng(1).integers(0, 2 if dtype == "BOOL" else 100, (4, 6)).astype(NATIVE[dtype])
    for array in (base, base.T, base[::-1, ::2], np.broadcast_to(base[:1], (3, 6)), base[1, 2], base[:0]):
        for given in (array, array.astype(array.dtype.newbyteorder(">"))):
            stored = StoredTensor.of(given)
            assert (stored.dtype, stored.shape, stored.nbytes) == (dtype, array.shape, array.nbytes)
            assert stored.bits.dtype == array.dtype
            assert np.array_equal(np.asarray(stored), array)
    assert np.shares_memory(np.asarray(StoredTensor.of(base)), base)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1, 1)])
def test_scalars_and_empty_tensors_keep_their_shape(dtype, shape):
    bits = np.ones(shape, "u2" if dtype == "BF16" else "u1")
    values = np.asarray(StoredTensor.from_bits(dtype, bits))
    assert_same_floats(values, bits.view(SMALL_FLOATS[dtype]).astype(np.float32))


def test_bits_are_read_only_and_the_source_is_not():
    source = np.zeros(3, np.float32)
    stored = StoredTensor.of(source)
    assert StoredTensor.of(stored) is stored
    for array in (stored.bits, np.asarray(stored)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(AttributeError):
        stored.bits = source
    source[0] = 1  # still the caller's own
    copied = np.array(stored)
    copied[0] = 2
    assert source[0] == 1 == stored.bits[0]


def test_the_array_protocol_converts_and_copies_as_asked():
    native, bfloat = StoredTensor.of(np.arange(3.0)), StoredTensor.from_bits("BF16", np.array([0x3F80], np.uint16))
    assert np.asarray(native, dtype=np.float32).dtype == np.float32
    assert np.asarray(bfloat, dtype=np.float64).tolist() == [1.0]
    assert np.asarray(bfloat, dtype=ml_dtypes.bfloat16).dtype == ml_dtypes.bfloat16
    assert np.asarray(native, copy=False) is native.bits
    for tensor, dtype in ((bfloat, None), (native, np.float32)):
        with pytest.raises(ValueError, match="copy=False"):
            np.asarray(tensor, dtype=dtype, copy=False)


def test_repr_names_dtype_shape_and_size_and_no_data():
    assert repr(StoredTensor.from_bits("F4", np.full((1000, 8), 0x77, np.uint8))) == "StoredTensor(F4, (1000, 16), 8000 bytes)"


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: StoredTensor.of(np.zeros(2, object)), ["dtype object", "bfloat16", "float32"]),
        (lambda: StoredTensor.of(np.zeros(2, ml_dtypes.float8_e4m3)), ["float8_e4m3 ", "float8_e4m3fn"]),
        (lambda: StoredTensor.of(np.zeros((2, 3), ml_dtypes.float4_e2m1fn)), ["(2, 3)", "even"]),
        (lambda: StoredTensor.of(np.zeros((), ml_dtypes.float4_e2m1fn)), ["()", "even"]),
        (lambda: StoredTensor.from_bits("F6_E2M3", np.zeros(2, np.uint8)), ["F6_E2M3", "F8_E4M3", "BF16"]),
        (lambda: StoredTensor.from_bits("BF16", np.zeros(2, np.uint8)), ["BF16", "uint16", "got uint8"]),
        (lambda: StoredTensor.from_bits("F32", np.zeros(2, np.uint32)), ["F32", "float32", "got uint32"]),
        (lambda: StoredTensor.from_bits("F4", np.zeros((), np.uint8)), ["F4", "at least one axis"]),
    ],
)
def test_refusals(build, words):
    with pytest.raises(ValueError) as refusal:
        build()
    assert all(word in str(refusal.value) for word in words), refusal.value
