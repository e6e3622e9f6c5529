"""Weights in the order in which products read them: the same bytes in, the same answers out."""

import copy
import pickle

import numpy as np
import pytest

import mrgptq as mg
from mrgptq import Activations, Dense, Hadamard, PrepackedMatrix, QuantizedMatrix


def weight(rows, cols, format, seed=0, **kwargs):
    return mg.quantize(np.random.default_rng(seed).standard_t(4, (rows, cols)).astype(np.float32), format, **kwargs)


def tiles_of(rows):
    """(tiles, words, 32) from (rows, bytes): the definition."""
    count, width = rows.shape
    filled = np.zeros((-(-count // 32) * 32, -(-width // 4) * 4), np.uint8)
    filled[:count, :width] = rows
    return np.ascontiguousarray(filled).view("<u4").reshape(len(filled) // 32, 32, -1).swapaxes(1, 2)


@pytest.mark.parametrize("shape", [(1, 32), (31, 96), (32, 128), (70, 160), (100, 2080)])
@pytest.mark.parametrize("format", list(mg.FORMATS))
def test_tiles_hold_the_bytes_and_give_them_back(format, shape):
    q = weight(*shape, format)
    p = mg.prepack(q)
    assert np.array_equal(p.code_tiles, tiles_of(q.codes)) and np.array_equal(p.scale_tiles, tiles_of(q.scales))
    assert p.code_tiles.dtype == np.uint32 and p.nbytes == p.code_tiles.nbytes + p.scale_tiles.nbytes and p.shape == q.shape
    assert p.code_tiles.ctypes.data % 64 == 0 and p.scale_tiles.ctypes.data % 64 == 0
    again = p.unpack(threads=2)
    assert np.array_equal(again.codes, q.codes) and np.array_equal(again.scales, q.scales) and again.tensor_scale == q.tensor_scale and again.format == format


def test_what_the_codes_mean_goes_along():
    q = weight(40, 64, "nvfp4", rotation=Hadamard(16))
    q = QuantizedMatrix(q.format, q.codes, q.scales, q.tensor_scale, q.rotation, Activations("nvfp4", tensor_scale=7.0))
    for p in (mg.prepack(q), copy.deepcopy(mg.prepack(q)), pickle.loads(pickle.dumps(mg.prepack(q)))):
        assert (p.rotation, p.activations, p.tensor_scale) == (q.rotation, q.activations, q.tensor_scale)
        assert np.array_equal(p.unpack().dequantize(unrotate=True), q.dequantize(unrotate=True))
    assert "PrepackedMatrix nvfp4, 40 x 64" in repr(p) and "Hadamard(16)" in repr(p)


@pytest.mark.parametrize("activations", [None, "mxfp4", "nvfp4", "int8"])
@pytest.mark.parametrize("rotation", [None, Hadamard(32), Dense(np.random.default_rng(5).standard_normal((16, 16)))])
@pytest.mark.parametrize("format", list(mg.FORMATS))
def test_products_are_those_of_the_matrix(format, rotation, activations):
    q = weight(75, 288, format, **({} if rotation is None else {"rotation": rotation}))
    p, x = mg.prepack(q), np.random.default_rng(1).standard_normal((70, 288), dtype=np.float32)
    for tokens in (1, 2, 3, 4, 5, 70):
        for threads in (1, 3):
            assert mg.matmul(x[:tokens], p, activations=activations, threads=threads).tobytes() == mg.matmul(x[:tokens], q, activations=activations).tobytes()
    if activations in ("mxfp4", "nvfp4"):
        packed = mg.quantize_activations(x, activations, rotation=q.rotation.dual)
        assert mg.matmul(packed, p).tobytes() == mg.matmul(packed, q).tobytes()


def test_tiles_need_not_lie_as_they_were_made():
    q = weight(64, 128, "mxfp4")
    p, x = mg.prepack(q), np.random.default_rng(1).standard_normal((2, 128), dtype=np.float32)
    apart = PrepackedMatrix("mxfp4", p.shape, np.repeat(p.code_tiles, 2, axis=1)[:, ::2], np.asfortranarray(p.scale_tiles), 1.0)
    assert mg.matmul(x, apart).tobytes() == mg.matmul(x, q).tobytes()


def test_no_rows_and_no_tokens():
    none = QuantizedMatrix("nvfp4", np.zeros((0, 32), np.uint8), np.zeros((0, 4), np.uint8), 1.0)
    assert mg.prepack(none).unpack().shape == (0, 64)
    q = weight(40, 64, "nvfp4")
    for given in (q, mg.prepack(q)):
        assert mg.matmul(none, given).shape == (0, 40)
    for empty in (none, mg.prepack(none)):
        assert mg.matmul(np.ones((3, 64), np.float32), empty).shape == (3, 0)


def test_refusals():
    q = weight(40, 64, "nvfp4")
    p = mg.prepack(q)
    with pytest.raises(TypeError, match="q is ndarray; it must be a QuantizedMatrix"):
        mg.prepack(np.zeros((2, 32), np.float32))
    with pytest.raises(TypeError, match="q is PrepackedMatrix; it must be a QuantizedMatrix"):
        mg.prepack(p)
    with pytest.raises(TypeError, match="q is ndarray; it must be a QuantizedMatrix or a PrepackedMatrix"):
        mg.matmul(np.zeros((2, 64), np.float32), p.code_tiles)
    with pytest.raises(ValueError, match=r"x has 32 columns; the weight has 64"):
        mg.matmul(np.zeros((2, 32), np.float32), p)
    with pytest.raises(ValueError, match=r"code_tiles is int32 of shape \(2, 8, 32\); nvfp4 of 40 x 64 has uint32 of \(2, 8, 32\)"):
        PrepackedMatrix("nvfp4", (40, 64), p.code_tiles.view(np.int32), p.scale_tiles, 1.0)
    with pytest.raises(ValueError, match=r"code_tiles is uint32 of shape \(2, 8, 32\); mxfp4 of 80 x 64 has uint32 of \(3, 8, 32\)"):
        PrepackedMatrix("mxfp4", (80, 64), p.code_tiles, p.scale_tiles, 1.0)
    with pytest.raises(ValueError, match=r"scale_tiles is uint32 of shape \(2, 8, 32\); nvfp4 of 40 x 64 has uint32 of \(2, 1, 32\)"):
        PrepackedMatrix("nvfp4", (40, 64), p.code_tiles, p.code_tiles, 1.0)
    with pytest.raises(ValueError, match=r"shape is \(32, 20\); nvfp4 has one scale for 16 columns"):
        PrepackedMatrix("nvfp4", (32, 20), p.code_tiles[:1, :2], p.scale_tiles[:1], 1.0)
    with pytest.raises(ValueError, match="64 columns"):
        PrepackedMatrix("nvfp4", (40, 64), p.code_tiles, p.scale_tiles, 1.0, Hadamard(128))
    with pytest.raises(ValueError, match="threads is 0"):
        mg.prepack(q, threads=0)
