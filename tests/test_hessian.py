"""Hessian: X^T X / tokens against NumPy in float64, and bytes that depend on the stream alone."""

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

import mrgptq as mg

PANEL = 256
U = 2.0**-24  # unit roundoff of float32


def tokens_of(rng, tokens, cols):
    """Inputs with the uneven columns that real layers have."""
    return (rng.standard_normal((tokens, cols)) * rng.lognormal(0, 1, cols)).astype(np.float32)


def matrix_of(batches, cols, **keywords):
    h = mg.Hessian(cols)
    for batch in batches:
        h.update(batch, **keywords)
    return h.matrix


def bound(x):
    """Entrywise bound on |H - exact H|.

    A panel's entry is a float32 sum of at most 256 float32 products, in any order, with or without FMA: its error is at most gamma_256 |X|^T |X| over the panel, with
    gamma_n = n u / (1 - n u). Panels are added in float64, whose own error, at most 2^-53 a panel plus one for the division, is far below one more u.
    """
    gamma = (PANEL + 1) * U / (1 - (PANEL + 1) * U)
    wide = np.abs(x.astype(np.float64))
    return gamma * (wide.T @ wide) / len(x)


@pytest.mark.parametrize("tokens", [1, 2, 255, 256, 257, 1000])
@pytest.mark.parametrize("cols", [1, 3, 127, 128, 129, 300])
def test_matrix_is_the_second_moment_within_the_rounding_of_a_panel(tokens, cols):
    x = tokens_of(np.random.default_rng(tokens * 1000 + cols), tokens, cols)
    h = mg.Hessian(cols)
    h.update(x)
    exact = x.astype(np.float64).T @ x.astype(np.float64) / tokens
    assert h.matrix.dtype == np.float64 and h.matrix.shape == (cols, cols)
    assert (np.abs(h.matrix - exact) <= bound(x)).all()
    assert np.array_equal(h.matrix, h.matrix.T)
    assert (h.tokens, h.cols) == (tokens, cols)


def test_every_input_of_leaf_is_within_the_bound(leaf):
    for x, exact in {id(leaf.inputs[name]): (leaf.inputs[name], leaf.hessians[name]) for name in leaf.inputs}.values():
        assert (np.abs(matrix_of([x], x.shape[1]) - exact) <= bound(x)).all()


def test_a_long_stream_keeps_its_digits():
    """A million equal tokens: a panel's product has 24 digits, so 4096 of them add exactly in float64, and one or many give the same mean; a float32 sum would round it 4096 times."""
    x = np.full((PANEL, 2), 4097.0, dtype=np.float32)
    one = matrix_of([x], 2)
    many = matrix_of([x] * 4096, 2)
    assert np.array_equal(one, many)
    assert abs(many[0, 1] / 4097.0**2 - 1) <= (PANEL + 1) * U


@pytest.mark.parametrize("splits", ["one by one", 255, 256, 257, 1, "random 0", "random 1", "random 2"])
def test_bytes_do_not_depend_on_the_batches(splits):
    x = tokens_of(np.random.default_rng(5), 1111, 40)
    if splits == "one by one":
        batches = list(x)  # rank 1: a single token
    elif isinstance(splits, int):
        batches = [x[i : i + splits] for i in range(0, len(x), splits)]
    else:
        rng = np.random.default_rng(int(splits[-1]))
        batches = np.split(x, np.sort(rng.integers(0, len(x) + 1, 12)))  # empty batches among them
    assert matrix_of(batches, 40).tobytes() == matrix_of([x], 40).tobytes()


def test_bytes_do_not_depend_on_shape_strides_or_reading_in_between():
    x = tokens_of(np.random.default_rng(6), 1200, 24)
    expected = matrix_of([x], 24).tobytes()
    assert matrix_of([x.reshape(2, 3, 200, 24)], 24).tobytes() == expected
    assert matrix_of([np.asfortranarray(x)], 24).tobytes() == expected
    assert matrix_of([np.repeat(x, 2, axis=1)[:, ::2]], 24).tobytes() == expected
    assert matrix_of([x[::-1].copy()[::-1]], 24).tobytes() == expected
    unaligned = np.frombuffer(b"\0" + x.tobytes(), dtype=np.uint8)[1:].view(np.float32).reshape(x.shape)
    assert matrix_of([unaligned], 24).tobytes() == expected
    h = mg.Hessian(24)
    for part in (x[:100], x[100:700], x[700:]):
        h.update(part)
        assert np.isfinite(h.matrix).all()  # reading closes no panel
    assert h.matrix.tobytes() == expected


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_bytes_do_not_depend_on_threads(threads):
    x = tokens_of(np.random.default_rng(7), 700, 400)
    assert matrix_of([x], 400, threads=threads).tobytes() == matrix_of([x], 400, threads=5).tobytes()


def test_dtypes_are_widened_exactly():
    x = tokens_of(np.random.default_rng(8), 300, 16)
    for narrow in (x.astype(np.float16), x.astype(ml_dtypes.bfloat16), x.astype(np.float64)):
        assert matrix_of([narrow], 16).tobytes() == matrix_of([narrow.astype(np.float32)], 16).tobytes()
    bits = x.astype(ml_dtypes.bfloat16)
    assert matrix_of([bits.view(np.uint16)], 16, dtype="bfloat16").tobytes() == matrix_of([bits], 16).tobytes()


@pytest.mark.parametrize(("first", "second"), [(256, 256), (512, 100), (100, 512), (100, 200), (1000, 1), (300, 0), (0, 300)])
def test_merging_two_streams_is_one_stream(first, second):
    x = tokens_of(np.random.default_rng(first + second), first + second, 33)
    a, b = mg.Hessian(33), mg.Hessian(33)
    a.update(x[:first])
    b.update(x[first:])
    before = b.matrix.tobytes()
    a.merge(b)
    assert (a.tokens, b.tokens) == (first + second, second)
    assert b.matrix.tobytes() == before  # the other is left as it is
    exact = x.astype(np.float64).T @ x.astype(np.float64) / len(x)
    assert (np.abs(a.matrix - exact) <= bound(x)).all()
    if first % PANEL == 0 and second <= PANEL:  # then the panels are the same ones, added in the same order
        assert a.matrix.tobytes() == matrix_of([x], 33).tobytes()


def test_a_merged_stream_goes_on_where_it_was():
    """A merge adds the other's sum and leaves the open panel alone: the tokens after it fall into the panels they would have fallen into without it."""
    rng = np.random.default_rng(9)
    x, other = tokens_of(rng, 500, 20), tokens_of(rng, 130, 20)
    h, o = mg.Hessian(20), mg.Hessian(20)
    h.update(x[:300])
    o.update(other)
    h.merge(o)
    h.update(x[300:])
    both = np.concatenate([x, other])
    assert h.tokens == 630
    assert (np.abs(h.matrix - both.astype(np.float64).T @ both / 630) <= bound(both)).all()


def test_equal_merges_in_equal_order_give_equal_bytes_and_other_orders_agree_to_rounding():
    rng = np.random.default_rng(10)
    cols = 290  # two blocks of columns and a rest
    parts = [tokens_of(rng, n, cols) for n in (300, 77, 512)]

    def merged(order, threads=None):
        total = mg.Hessian(cols)
        for i in order:
            h = mg.Hessian(cols)
            h.update(parts[i])
            total.merge(h, threads=threads)
        return total.matrix

    assert merged([0, 1, 2]).tobytes() == merged([0, 1, 2], 1).tobytes() == merged([0, 1, 2], 3).tobytes()
    x = np.concatenate(parts)
    for order in ([2, 1, 0], [1, 0, 2]):  # the panels are the same, their float64 sum is not: 6 additions at most
        assert (np.abs(merged(order) - merged([0, 1, 2])) <= 12 * 2.0**-53 * (np.abs(x).T.astype(np.float64) @ np.abs(x)) / len(x)).all()


def test_one_update_of_many_panels_is_the_same_as_many_updates():
    """Sixteen panels of 256 tokens are added at a visit: here are three visits, a panel under way before them and a rest behind."""
    x = tokens_of(np.random.default_rng(17), 3 * 16 * 256 + 700, 40)
    at_once, by_panels = mg.Hessian(40), mg.Hessian(40)
    for h in (at_once, by_panels):
        h.update(x[:100])
    at_once.update(x[100:])
    for first in range(100, len(x), 256):
        by_panels.update(x[first : first + 256])
    assert at_once.tokens == by_panels.tokens == len(x)
    assert at_once.matrix.tobytes() == by_panels.matrix.tobytes()
    assert np.all(np.abs(at_once.matrix - x.T.astype(np.float64) @ x / len(x)) <= 256 * 2.0**-24 * (np.abs(x).T.astype(np.float64) @ np.abs(x)) / len(x))


def test_threads_that_share_a_hessian_lose_no_token_and_read_whole_sums():
    """Of ones every panel is exact, whoever adds it and however much of it: H is 1 whenever it is read."""
    h, other, seen = mg.Hessian(48), mg.Hessian(48), []
    other.update(np.ones((10, 48), np.float32))
    batches = [np.ones((size, 48), np.float32) for size in (1, 100, 257, 700)]

    def work(seed):
        for size in np.random.default_rng(seed).integers(0, len(batches), 40):
            h.update(batches[size], threads=1 + seed % 2)
            h.merge(other)
            seen.append(len(batches[size]) + 10)
            matrix = h.as_array(threads=1)
            assert (matrix == 1).all()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert h.tokens == sum(seen) and (h.matrix == 1).all()


def test_no_tokens_is_zero_and_legal():
    h = mg.Hessian(5)
    assert h.tokens == 0 and np.array_equal(h.matrix, np.zeros((5, 5)))
    h.update(np.zeros((0, 5), dtype=np.float32))
    h.merge(mg.Hessian(5))
    assert h.tokens == 0 and np.array_equal(h.matrix, np.zeros((5, 5)))


@pytest.mark.parametrize("tokens", [1, 256, 700])
def test_its_matrix_goes_where_it_is_asked_for_and_nowhere_else(tokens):
    """Into rows that lie further apart than they are long, as a factor's do; what lies between them stays."""
    h = mg.Hessian(40)
    h.update(tokens_of(np.random.default_rng(13), tokens, 40))
    room = np.full((40, 48), 7.0)
    assert h.as_array(out=room[:, :40], threads=2).base is room
    assert np.array_equal(room[:, :40], h.matrix) and (room[:, 40:] == 7).all()
    for rotation in (mg.Identity(), mg.Hadamard(8)):
        assert np.array_equal(rotation.apply_hessian(h, out=room[:, :40]), rotation.apply_hessian(h.matrix)) and (room[:, 40:] == 7).all()
    factor = mg.Factor(h)
    assert factor.tokens == h.tokens == tokens


def test_it_is_an_array_wherever_numpy_asks():
    x = tokens_of(np.random.default_rng(11), 64, 6)
    h = mg.Hessian(6)
    h.update(x)
    assert np.array_equal(np.asarray(h), h.matrix)
    assert np.asarray(h, dtype=np.float32).dtype == np.float32
    assert np.array_equal(h @ np.eye(6), h.matrix)
    h.matrix[:] = 0  # a fresh copy
    np.asarray(h)[:] = 0
    assert h.matrix.any()
    with pytest.raises(ValueError, match="copy"):
        h.__array__(copy=False)
    assert repr(h) == "Hessian(6 columns, 64 tokens)"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda h: mg.Hessian(0), ValueError, "cols is 0.*from 1 on"),
        (lambda h: mg.Hessian(2.0), ValueError, r"cols is 2\.0"),
        (lambda h: mg.Hessian(True), ValueError, "cols is True"),
        (lambda h: h.update(np.ones((2, 3), np.float32)), ValueError, "x has 3 columns; this Hessian has 4"),
        (lambda h: h.update(np.ones((0, 3), np.float32)), ValueError, r"x is empty: its shape is \(0, 3\)"),
        (lambda h: h.update(np.float32(1)), ValueError, r"shape is \(\)"),
        (lambda h: h.update(np.ones((2, 4), int)), TypeError, "x has dtype int64; allowed: float32, float64, float16, bfloat16"),
        (lambda h: h.update(np.ones((2, 4), np.float32), threads=0), ValueError, "threads is 0"),
        (lambda h: h.merge(np.eye(4)), TypeError, "other is ndarray; only a Hessian"),
        (lambda h: h.merge(h), ValueError, "cannot be merged into itself"),
        (lambda h: h.merge(mg.Hessian(3)), ValueError, "other has 3 columns; this Hessian has 4"),
    ],
)
def test_refusals_leave_it_as_it_was(call, error, words):
    h = mg.Hessian(4)
    h.update(np.eye(4, dtype=np.float32))
    before = h.matrix.tobytes()
    with pytest.raises(error, match=words):
        call(h)
    assert (h.tokens, h.matrix.tobytes()) == (4, before)


@pytest.mark.parametrize("rotation", [mg.Identity(), mg.Hadamard(16)])
@pytest.mark.parametrize("given", ["array", "running"])
def test_an_out_that_does_not_fit_is_refused_before_anything_is_written(rotation, given):
    hessian = np.eye(48) + 0.1
    if given == "running":
        hessian = mg.Hessian(48)
        hessian.update(np.random.default_rng(0).standard_normal((100, 48)))
    for out, message in [
        (np.zeros((4, 4)), r"out is float64 of shape \(4, 4\); it must be a float64 array of shape \(48, 48\)"),
        (np.zeros((48, 48), np.float32), "out is float32 of shape"),
        ([1], "out is list"),
        (np.zeros((48, 96))[:, ::2], "columns must be adjacent"),
        (np.broadcast_to(0.0, (48, 48)), "read-only"),
    ]:
        with pytest.raises(ValueError, match=message):
            rotation.apply_hessian(hessian, out=out)
        if given == "running":
            with pytest.raises(ValueError, match=message):
                hessian.as_array(out=out)
        assert not np.any(out) or out == [1]
    if given == "array":
        room = np.zeros((96, 48))
        room[:48] = hessian
        with pytest.raises(ValueError, match="out overlaps hessian, which is left as it is"):
            rotation.apply_hessian(room[:48], out=room[1:49])
        assert np.array_equal(room[:48], hessian)
