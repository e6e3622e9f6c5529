"""Block rotations, by Hadamard and by other matrices, against SciPy's matrices in float64, and the bytes of mrgptq.reference."""

import ml_dtypes
import numpy as np
import pytest
from scipy.linalg import block_diag, hadamard
from scipy.stats import ortho_group

import mrgptq as mg
from mrgptq import reference
from mrgptq.rotations import rotation_of

POWERS = [2**n for n in range(1, 13)]
U32, U64 = 2.0**-24, 2.0**-53  # unit roundoff


def wide(cols, block_size):
    """The rotation as a (cols, cols) float64 matrix."""
    return block_diag(*[hadamard(block_size) / np.sqrt(block_size)] * (cols // block_size))


def matrix(rows, cols, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, cols)) * np.exp2(rng.integers(-8, 9, (rows, 1)))).astype(np.float32)


def second_moment(cols, seed=0):
    x = matrix(2 * cols, cols, seed).astype(np.float64)
    return x.T @ x / len(x)


def relative(block_size):
    """How far, relative to its 2-norm, a rotated block may lie from the exact one.

    Each of log2(k) levels of butterflies is an orthogonal map times sqrt(2) whose entries are rounded once: u of the norm a level. The factor 1/sqrt(k) is rounded once and so is its
    product. 1.01 covers the squares of u, and float64's own error on the other side.
    """
    return 1.01 * (np.log2(block_size) + 2) * U32


def block_norms(x, block_size):
    return np.linalg.norm(x.astype(np.float64).reshape(len(x), -1, block_size), axis=-1)


@pytest.mark.parametrize("k", POWERS)
def test_matrix_is_scipys_to_the_bit(k):
    block = mg.Hadamard(k).matrix
    assert block.dtype == np.float32
    assert np.array_equal(block, hadamard(k) * np.float32(1 / np.sqrt(k)))
    if k <= 512:
        # The entries' squares are exact in float64, their sum is rounded k times; the entries themselves are off by u32.
        assert np.abs(block.astype(np.float64) @ block.T.astype(np.float64) - np.eye(k)).max() <= 2.001 * U32 + k * U64


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("k", [k for k in POWERS if k <= 512])
def test_apply_is_the_product_with_the_block_diagonal_matrix(k, blocks):
    x, rotation = matrix(11, k * blocks), mg.Hadamard(k)
    rotated = rotation.apply(x)
    assert rotated.dtype == np.float32 and rotated.shape == x.shape
    error = block_norms(rotated - x.astype(np.float64) @ wide(k * blocks, k), k)
    assert (error <= relative(k) * block_norms(x, k)).all()
    assert np.array_equal(rotated.view(np.uint32), reference.rotate(x, k).view(np.uint32))
    back = rotation.apply_inverse(rotated)
    assert (block_norms(back.astype(np.float64) - x, k) <= 2.01 * relative(k) * block_norms(x, k)).all()


def test_rotated_layer_computes_what_the_layer_computes():
    x, w, rotation = matrix(5, 96, 1), matrix(7, 96, 2), mg.Hadamard(32)
    rotated = rotation.apply(x).astype(np.float64) @ rotation.apply(w).T.astype(np.float64)
    scale = np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(w, axis=1))
    assert (np.abs(rotated - x.astype(np.float64) @ w.T.astype(np.float64)) <= 2.01 * relative(32) * scale).all()  # Cauchy-Schwarz


@pytest.mark.parametrize("shape", [(64,), (1, 64), (6, 64), (2, 3, 64), (2, 1, 3, 64)])
def test_any_rank_and_in_place(shape):
    x, rotation = matrix(6, 64)[: int(np.prod(shape[:-1]))].reshape(shape), mg.Hadamard(16)
    expected = reference.rotate(x, 16)
    kept = x.copy()
    assert np.array_equal(rotation.apply(x), expected)
    assert np.array_equal(x, kept)
    out = np.full(shape, np.nan, dtype=np.float32)
    assert rotation.apply(x, out) is out and np.array_equal(out, expected)
    assert rotation.apply(x, out=x) is x and np.array_equal(x, expected)
    rotation.apply_inverse(x, out=x)
    assert np.array_equal(x, reference.rotate(expected, 16))


LAYOUTS = {
    "slice of a wider one": lambda x: np.pad(x, ((0, 0), (3, 5)), constant_values=np.nan)[:, 3:-5],
    "every second row": lambda x: x.repeat(2, axis=0)[::2],
    "upside down": lambda x: np.ascontiguousarray(x[::-1])[::-1],
}
INPUTS = LAYOUTS | {
    "Fortran": np.asfortranarray,
    "right to left": lambda x: np.ascontiguousarray(x[:, ::-1])[:, ::-1],
    "big-endian": lambda x: x.astype(">f4"),
    "nested lists": lambda x: x.astype(np.float64).tolist(),
}


@pytest.mark.parametrize("layout", INPUTS)
def test_strides_do_not_reach_the_bytes(layout):
    x = matrix(6, 64)
    assert np.array_equal(mg.Hadamard(16).apply(INPUTS[layout](x)), reference.rotate(x, 16))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_outputs_are_filled_and_nothing_else(layout):
    x = matrix(6, 64)
    out = LAYOUTS[layout](np.zeros_like(x))
    around = out if out.base is None else out.base
    before = around.copy()
    mg.Hadamard(16).apply(x, out=out)
    assert np.array_equal(out, reference.rotate(x, 16))
    out[:] = 0
    assert np.array_equal(around, before, equal_nan=True)
    out[:] = x
    mg.Hadamard(16).apply(out, out=out)
    assert np.array_equal(out, reference.rotate(x, 16))


@pytest.mark.parametrize("shift", [-1, 0, 1])
@pytest.mark.parametrize("rotation", [mg.Hadamard(16), mg.Identity()])
def test_an_output_may_overlap_its_input(rotation, shift):
    buffer = matrix(9, 64)
    x, out = buffer[1:-1], buffer[1 + shift : len(buffer) - 1 + shift]
    expected = rotation.apply(x.copy())
    rotation.apply(x, out=out)
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16, "bfloat16 bits"])
def test_every_dtype_is_widened_to_float32(dtype):
    bits = dtype == "bfloat16 bits"
    x = matrix(6, 64).astype(ml_dtypes.bfloat16 if bits else dtype)
    for rotation, k in ((mg.Hadamard(16), 16), (mg.Identity(), None)):
        rotated = rotation.apply(x.view(np.uint16), dtype="bfloat16") if bits else rotation.apply(x)
        assert rotated.dtype == np.float32
        assert np.array_equal(rotated, reference.rotate(x.astype(np.float32), k))


@pytest.mark.parametrize(("k", "cols"), [(2, 6), (16, 16), (16, 208), (64, 192), (256, 256)])
def test_hessian_is_rotated_on_both_sides(k, cols):
    h = second_moment(cols)
    kept = h.copy()
    rotated = mg.Hadamard(k).apply_hessian(h)
    assert np.array_equal(h, kept)
    assert np.array_equal(rotated, rotated.T)
    s = block_diag(*[hadamard(k)] * (cols // k)).astype(np.longdouble)
    exact = s.T @ h.astype(np.longdouble) @ s / k
    # 2 log2(k) levels of butterflies and the mean of the two halves, u64 each in the Frobenius norm as in relative(); 1/k is a power of two.
    assert np.linalg.norm((rotated - exact).astype(np.float64)) <= 1.01 * (2 * np.log2(k) + 1) * U64 * np.linalg.norm(h)
    assert np.array_equal(rotated, reference.rotate_hessian(h, k))


@pytest.mark.parametrize("k", [2, 16, 128])
def test_identity_hessian_stays_exactly_the_identity(k):
    assert np.array_equal(mg.Hadamard(k).apply_hessian(np.eye(256)), np.eye(256))


def test_hessian_objects_and_other_arrays_are_taken():
    x, rotation = matrix(300, 64), mg.Hadamard(16)
    h = mg.Hessian(64)
    h.update(x)
    for given in (h, h.matrix.tolist(), np.asfortranarray(h.matrix)):
        assert np.array_equal(rotation.apply_hessian(given), reference.rotate_hessian(h.matrix, 16))
    narrow = h.matrix.astype(np.float32)
    assert np.array_equal(rotation.apply_hessian(narrow), reference.rotate_hessian(narrow.astype(np.float64), 16))


def test_same_bytes_for_any_number_of_threads():
    x, h, rotation = matrix(131, 192), second_moment(192), mg.Hadamard(64)
    for threads in (1, 2, 3, 8):
        assert np.array_equal(rotation.apply(x, threads=threads), reference.rotate(x, 64))
        assert np.array_equal(rotation.apply_hessian(h, threads=threads), reference.rotate_hessian(h, 64))


def test_identity_copies():
    x, h = matrix(4, 7), second_moment(7)
    rotation = mg.Identity()
    assert rotation.block_size is None
    for apply in (rotation.apply, rotation.apply_inverse):
        same = apply(x)
        assert np.array_equal(same, x) and not np.shares_memory(same, x)
        out = np.empty_like(x)
        assert apply(x, out=out) is out and np.array_equal(out, x)
    same = rotation.apply_hessian(h)
    assert np.array_equal(same, h) and not np.shares_memory(same, h)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("rotation", [mg.Identity(), mg.Hadamard(16), mg.Hadamard(64)])
def test_what_is_written_to_a_hessian_later_does_not_reach_its_factor(rotation, dtype):
    given = second_moment(64).astype(dtype)
    as_object = mg.Hessian(64)
    as_object.update(matrix(300, 64))
    for h, write in ((given, lambda: given.fill(7)), (as_object, lambda: as_object.update(matrix(100, 64)))):
        factor = mg.Factor(h, rotation=rotation)
        kept = factor.hessian.copy()
        write()
        assert np.array_equal(factor.hessian, kept)


@pytest.mark.parametrize("rotation", [None, mg.Hadamard(16)])
def test_a_factor_leaves_the_callers_array_alone_and_reads_it_however_it_lies(rotation):
    h = second_moment(64)
    h = (h + h.T) / 2
    expected = mg.Factor(h, rotation=rotation).hessian
    assert np.array_equal(expected, h if rotation is None else reference.rotate_hessian(h, 16))
    unaligned = np.frombuffer(bytearray(b"x" + h.tobytes()), np.uint8)[1:].view(np.float64).reshape(64, 64)
    turned = np.asfortranarray(h[::-1, ::-1])[::-1, ::-1]
    for given in (h.copy(), turned, unaligned):
        before = given.tobytes()
        factor = mg.Factor(given, rotation=rotation)
        assert np.array_equal(factor.hessian, expected) and given.tobytes() == before
        assert factor.hessian is not factor.hessian  # a fresh one each time
    given[3, 5] *= 1 + 1e-9  # made symmetric on the way
    uneven = given.copy()
    factor = mg.Factor(given, rotation=rotation)
    assert np.array_equal(given, uneven) and np.array_equal(factor.hessian, factor.hessian.T)
    narrow = h.astype(np.float32)
    assert np.array_equal(mg.Factor(narrow, rotation=rotation).hessian, mg.Factor(narrow.astype(np.float64), rotation=rotation).hessian)


def test_rotations_are_values():
    assert mg.Hadamard(16) == mg.Hadamard(np.int64(16)) == rotation_of(16) != mg.Hadamard(32)
    assert mg.Identity() == rotation_of(None) != mg.Hadamard(16)
    assert {mg.Hadamard(16), rotation_of(16), mg.Identity(), rotation_of(None)} == {mg.Hadamard(16), mg.Identity()}
    assert eval(repr(mg.Hadamard(64)), vars(mg)) == mg.Hadamard(64) and eval(repr(mg.Identity()), vars(mg)) == mg.Identity()


@pytest.mark.parametrize("block_size", [0, 1, 3, -4, 12, 2.0, True, "16", None])
def test_only_powers_of_two_are_block_sizes(block_size):
    with pytest.raises(ValueError, match=f"block_size is {block_size!r}; it must be a power of two from 2 on"):
        mg.Hadamard(block_size)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.apply(matrix(2, 72)), "x has 72 columns; a rotation of block size 16 needs a multiple of it"),
        (lambda t: t.apply_hessian(np.eye(24)), "hessian has 24 columns; a rotation of block size 16 needs a multiple of it"),
        (lambda t: t.apply(np.float32([[1] * 15 + [np.nan]])), "x is nan at row 0, column 15"),
        (lambda t: t.apply(matrix(2, 16), out=np.empty((2, 32), np.float32)), r"out is float32 of shape \(2, 32\); it must be a float32 array of shape \(2, 16\)"),
        (lambda t: t.apply(matrix(2, 16), out=np.empty((2, 16))), "out is float64 of shape"),
        (lambda t: t.apply(matrix(2, 16), out=np.empty((16, 2), np.float32).T), "out has strides .* columns must be adjacent"),
        (lambda t: t.apply(matrix(4, 16).reshape(2, 2, 16), out=np.empty((2, 4, 16), np.float32)[:, ::2]), "out has strides .* columns must be adjacent"),
        (lambda t: t.apply(matrix(2, 16), out=np.broadcast_to(np.float32(0), (2, 16))), "out is read-only"),
        (lambda t: t.apply(matrix(2, 16), out=[[0.0] * 16] * 2), "out is list"),
        (lambda t: t.apply(np.full((3, 32), 1e38, np.float32)), "row 0 overflows float32 when it is rotated by blocks of 16"),
    ],
)
def test_what_cannot_be_rotated_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(mg.Hadamard(16))


# ---- Any matrix


def orthogonal(k, seed=0):
    return ortho_group.rvs(k, random_state=seed).astype(np.float32) if k > 1 else np.float32([[-1]])


@pytest.mark.parametrize("blocks", [1, 3, 4, 9])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 48, 64, 100, 128])
def test_a_matrix_multiplies_every_block(k, blocks):
    x, block = matrix(11, k * blocks), np.random.default_rng(k).standard_normal((k, k)).astype(np.float32)
    rotated = mg.Dense(block).apply(x)
    wide_block = block_diag(*[block.astype(np.float64)] * blocks)
    # k products and k sums in float32 (Higham, Accuracy and Stability, section 3.1), and the square of that, against float64's.
    bound = 1.01 * (k + 1) * U32 * (np.abs(x.astype(np.float64)) @ np.abs(wide_block))
    assert (np.abs(rotated - x.astype(np.float64) @ wide_block) <= bound).all()
    assert np.array_equal(rotated, reference.multiply_blocks(x, block))
    for threads in (1, 2, 3):
        assert mg.Dense(block).apply(x, threads=threads).tobytes() == rotated.tobytes()
    kept = x.copy()
    assert mg.Dense(block).apply(kept, out=kept) is kept and np.array_equal(kept, rotated)


def test_a_matrix_takes_any_rank_and_any_layout():
    x, rotation = matrix(6, 60), mg.Dense(orthogonal(12))
    expected = reference.multiply_blocks(x, rotation.matrix)
    assert np.array_equal(rotation.apply(x.reshape(2, 3, 60)), expected.reshape(2, 3, 60))
    assert np.array_equal(rotation.apply(np.asfortranarray(x)), expected)
    assert np.array_equal(mg.Dense(np.asfortranarray(rotation.matrix)).apply(x), expected)
    assert np.array_equal(rotation.apply(x.astype(ml_dtypes.bfloat16)), reference.multiply_blocks(x.astype(ml_dtypes.bfloat16).astype(np.float32), rotation.matrix))


def test_a_matrix_turns_back_and_moments_with_it():
    x, rotation = matrix(40, 60), mg.Dense(np.random.default_rng(2).standard_normal((12, 12)))
    # Two products and an inverse of a matrix whose condition is below 100: (k + 1) u each and for the inverse's rounding, times it.
    assert np.linalg.cond(rotation.matrix.astype(np.float64)) < 100
    back = rotation.apply_inverse(rotation.apply(x))
    assert (np.linalg.norm(back - x, axis=1) <= 100 * 3 * 13 * U32 * np.linalg.norm(x, axis=1)).all()
    wide_block, h = block_diag(*[rotation.matrix.astype(np.float64)] * 5), second_moment(60)
    for m, got in ((h, rotation.apply_hessian(h)), (np.triu(h), rotation.apply_both(np.triu(h)))):
        bound = 2 * 61 * U64 * np.abs(wide_block.T) @ np.abs(m) @ np.abs(wide_block)  # two products of 60 terms at most, on either side
        assert (np.abs(got - wide_block.T @ m @ wide_block) <= 2 * bound).all()
    assert np.array_equal(rotation.apply_hessian(h), rotation.apply_hessian(h).T)


def test_the_dual_turns_weights_so_that_products_stay():
    x, w, rotation = matrix(9, 60, 1), matrix(7, 60, 2), mg.Dense(np.random.default_rng(2).standard_normal((12, 12)))
    turned = rotation.apply(x).astype(np.float64) @ rotation.dual.apply(w).T.astype(np.float64)
    scale = np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(w, axis=1))
    assert (np.abs(turned - x.astype(np.float64) @ w.T.astype(np.float64)) <= 100 * 3 * 13 * U32 * scale).all()  # as above
    assert np.allclose(rotation.dual.dual.matrix, rotation.matrix, rtol=0, atol=100 * U32 * np.abs(rotation.matrix).max())
    assert mg.Hadamard(4).dual == mg.Hadamard(4) and mg.Identity().dual == mg.Identity()


def test_matrices_compare_and_do_not_change():
    block = orthogonal(4)
    a, b, c = mg.Dense(block), mg.Dense(block.astype(np.float64)), mg.Dense(2 * block)
    assert a == b and hash(a) == hash(b) and a != c and a != mg.Hadamard(4) and repr(a) == "Dense(4 x 4)" and a.block_size == 4
    block[:] = 0
    assert a == b
    with pytest.raises(ValueError, match="read-only"):
        a.matrix[0, 0] = 1


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: mg.Dense(np.ones((3, 3))), ValueError, "matrix is singular in float32"),
        (lambda: mg.Dense([[np.float32(1e-42)]]), ValueError, "matrix is singular in float32"),  # whose inverse float32 lacks
        (lambda: mg.Dense(np.ones((3, 2))), ValueError, r"matrix has shape \(3, 2\); it must be square"),
        (lambda: mg.Dense(np.ones(3)), ValueError, "matrix has rank 1"),
        (lambda: mg.Dense(np.full((2, 2), np.nan)), ValueError, "matrix is nan at row 0, column 0"),
        (lambda: mg.Dense(np.eye(2, dtype=int)), TypeError, "matrix has dtype int64"),
        (lambda: mg.Dense(np.eye(5)).apply(np.ones((2, 12), np.float32)), ValueError, "x has 12 columns; a rotation of block size 5 needs a multiple of it"),
        (lambda: mg.Dense(np.eye(5)).apply(np.full((2, 10), np.inf, np.float32)), ValueError, "x is inf at row 0, column 0"),
        (lambda: mg.Factor(np.eye(16), rotation=mg.Dense(np.eye(4))), TypeError, r"rotation is Dense\(4 x 4\); it must be None, Identity\(\) or Hadamard"),
        (lambda: mg.Recipe(rotation=mg.Dense(np.eye(4))), ValueError, "block_size is Dense"),
    ],
)
def test_a_matrix_that_is_none_or_does_not_fit_is_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_a_checkpoint_refuses_a_matrix_by_name(tmp_path):
    q = mg.quantize(np.ones((2, 32), np.float32), rotation=mg.Dense(np.diag([1.0, 2.0])))
    for dialect in ("compressed-tensors", "fp_quant", "mrgptq"):
        with pytest.raises(ValueError, match=r"Dense\(2 x 2\); checkpoints know Hadamard rotations alone"):
            mg.save(tmp_path / dialect, {"a.weight": q}, dialect=dialect)
        assert not (tmp_path / dialect).exists()
