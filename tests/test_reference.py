"""reference.py, the executable specification: against ml_dtypes, exact rationals, the textbook form of GPTQ, and its own definition of the loss."""

import ast
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mrgptq import reference

E2M1_TIES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
FORMATS = {"nvfp4": 16, "mxfp4": 32}


def random_floats(seed, low, high, count=20_000):
    rng = np.random.default_rng(seed)
    return (rng.choice([-1, 1], count) * 2.0 ** rng.uniform(low, high, count)).astype(np.float32)


def with_neighbours(ties):
    ties = np.array(ties, dtype=np.float32)
    points = np.concatenate([ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))])
    return np.concatenate([points, -points])


def layer_like(seed, rows, cols, tokens=None):
    """A weight and a well-conditioned second moment with correlated columns, as real inputs have."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens or 4 * cols, cols)) @ (np.eye(cols) + 0.5 * rng.standard_normal((cols, cols)) / np.sqrt(cols))
    return rng.standard_normal((rows, cols)).astype(np.float32), x.T @ x / len(x)


def steps_for(w, format, g=None):
    g = reference.tensor_scale(w, format) if g is None else g
    return np.repeat(reference.steps_of(reference.find_scales(w, format, g=g), format, g), FORMATS[format], axis=1)


def test_it_imports_numpy_alone():
    tree = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))
    modules = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert modules == ["numpy"]


# ---- Elements and scales


def test_e2m1_is_ml_dtypes_cast():
    x = np.concatenate([random_floats(0, -4, 4), with_neighbours(E2M1_TIES), np.float32([0, -0.0, 6, -6, 1e30, -1e30, 1e-45])])
    codes = reference.encode_e2m1(x)
    expected = x.astype(ml_dtypes.float4_e2m1fn)
    assert np.array_equal(reference.decode_e2m1(codes), expected.astype(np.float32))
    nonzero = codes != 8  # ml_dtypes keeps the sign of what rounds to zero, code 8; ours has one zero, code 0
    assert nonzero.all() and np.array_equal(codes, np.where(expected.view(np.uint8) == 8, 0, expected.view(np.uint8)))
    every = np.arange(16, dtype=np.uint8)
    assert np.array_equal(reference.decode_e2m1(every), every.view(ml_dtypes.float4_e2m1fn).astype(np.float32))
    assert np.array_equal(reference.encode_e2m1(x.astype(np.float64)), codes)  # GPTQ rounds float64


def test_e4m3_is_ml_dtypes_cast():
    every = np.arange(256, dtype=np.uint8)
    values = every.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(reference.decode_e4m3(every), values, equal_nan=True)
    finite = np.sort(values[np.isfinite(values) & (values >= 0)])[1:]
    ties = (finite[1:].astype(np.float64) + finite[:-1]) / 2  # exact in float32: five digits
    x = np.concatenate([random_floats(1, -12, 9), with_neighbours(ties), with_neighbours([2.0**-10, 448, 464, 1e30]), np.float32([0, -0.0])])
    clamped = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn)  # ml_dtypes makes NaN of what overflows
    assert np.array_equal(reference.encode_e4m3(x), clamped.view(np.uint8))


def test_e8m0_is_ml_dtypes_cast():
    every = np.arange(256, dtype=np.uint8)
    assert np.array_equal(reference.decode_e8m0(every), every.view(ml_dtypes.float8_e8m0fnu).astype(np.float32), equal_nan=True)


def test_the_error_measure_is_the_power_2_4():
    """Two Halley steps leave 1e-12 of the fifth root; squared twice over, a relative error of 1e-11 is generous."""
    e = random_floats(2, -120, 120).astype(np.float64)
    assert reference.power_2_4(np.zeros(1))[0] == 0
    assert (np.abs(reference.power_2_4(e) / np.abs(e) ** 2.4 - 1) < 1e-11).all()


def test_the_searched_step_has_the_least_error():
    groups = np.random.default_rng(3).standard_t(4, (200, 16)).astype(np.float32)
    sixth = np.abs(groups).max(-1) / np.float32(6)
    found = reference.searched_sixth(groups, sixth)
    factors = (1 - 0.8 * np.arange(100) / 100).astype(np.float32)
    steps = factors * sixth[:, None]
    values = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6]).astype(np.float64)
    distance = np.abs(np.abs(groups[:, None, :, None].astype(np.float64)) - steps[..., None, None].astype(np.float64) * values).min(-1)  # nearest value by exhaustion
    errors = (distance**2.4).sum(-1)
    chosen = (steps == found[:, None]).argmax(-1)
    assert np.array_equal(steps[np.arange(200), chosen], found)
    assert (errors[np.arange(200), chosen] <= errors.min(-1) * (1 + 1e-9)).all()  # the power is 1e-11 off
    assert len(set(chosen)) > 10


def mx_exponent(a, rule):
    """The exponent a rule stores, in exact rationals, from the table of algorithms: a = m 2^k, 1 <= m < 2."""
    a, k = Fraction(float(a)), 0
    while Fraction(2) ** (k + 1) <= a:
        k += 1
    while Fraction(2) ** k > a:
        k -= 1
    if rule == "floor":
        return k - 2
    if rule == "ceil":  # the smallest power of two with a <= 6 scale
        return next(e for e in range(k - 4, k + 2) if a <= 6 * Fraction(2) ** e)
    if rule == "even":
        return k - 2 + (a / Fraction(2) ** k >= Fraction(7, 4))
    return k  # four-thirds: 4/3 2^(k-2) is 2^k / 3


@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "four-thirds"])
def test_mx_rules_in_exact_rationals(rule):
    edges = [m * 2.0**k for k in (-100, -3, 0, 5, 100) for m in (1, 1.5, 1.75)]
    a = np.abs(np.concatenate([random_floats(3, -110, 110, 500), with_neighbours(edges)]))
    assert np.array_equal(reference.mx_scale(a, rule).astype(int) - 127, [mx_exponent(x, rule) for x in a])


# ---- GPTQ


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "cols", "tokens"), [(8, 32, None), (24, 96, None), (16, 160, 200)])
def test_one_factorisation_gives_the_textbook_codes(format, order, rows, cols, tokens):
    w, h = layer_like(rows + cols, rows, cols, tokens)
    steps = steps_for(w, format)
    codes, _, used = reference.gptq(w, h, steps, order, 0.01)
    assert used == 0.01
    assert np.array_equal(codes, reference.gptq_textbook(w, h, steps, order, 0.01))
    assert not np.array_equal(codes, reference.encode_e2m1(w / steps))  # feedback changed something


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rotation", [None, 32, 128])
def test_one_factorisation_gives_the_textbook_codes_on_leaf(leaf, format, order, rotation):
    for name in [name for name in leaf.weights if name.startswith(("layers.0.", "layers.3."))]:
        w = reference.rotate(leaf.weights[name], rotation)
        h = reference.rotate_hessian(leaf.hessians[name], rotation)
        steps = steps_for(w, format)
        codes, _, used = reference.gptq(w, h, steps, order, 0.01)
        assert used == 0.01
        assert np.array_equal(codes, reference.gptq_textbook(w, h, steps, order, 0.01)), name


def test_at_an_exact_tie_the_forms_may_part_and_lose_nothing():
    """The two forms are equal in real arithmetic. On a lattice that puts the second column's value onto exact ties, the inverse of the textbook form moves it by rounding, so
    either neighbour may come out: both are nearest, and the loss is the same. Everywhere else the codes are equal."""
    h = np.array([[3.0, 1.0], [1.0, 2.0]])
    grid = np.arange(-32, 33) / 8
    w = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2).astype(np.float32)
    steps = np.ones_like(w)
    for order in ("natural", "activation"):
        codes, t, _ = reference.gptq(w, h, steps, order, 0.0)
        textbook = reference.gptq_textbook(w, h, steps, order, 0.0)
        to_tie = np.abs(np.abs(t)[..., None] - E2M1_TIES).min(-1)
        assert (to_tie == 0).any()
        parted = codes != textbook
        assert (to_tie[parted] < 1e-12).all()  # a handful of operations on numbers below 8: 1e-15 each
        for a, b, row in zip(codes, textbook, w, strict=True):
            losses = [reference.loss((row - reference.decode_e2m1(c))[None], h) for c in (a, b)]
            assert abs(losses[0] - losses[1]) < 1e-11


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("format", FORMATS)
def test_damped_loss_is_the_sum_over_pivots_and_below_babais_bound(format, order):
    """tr(E (H + λI) E^T) = Σ (L[i,i] (t - q))², and no unclipped residual exceeds half the gap it lies in. GPTQ is greedy: that it beats plain rounding is no theorem, this is."""
    w, h = layer_like(1, 16, 96)
    steps = steps_for(w, format)
    codes, t, used = reference.gptq(w, h, steps, order, 0.01)
    visit, lower, _ = reference.factorise(h, order, 0.01)
    pivots = np.empty(len(h))
    pivots[visit[::-1]] = lower.diagonal() ** 2
    q = (steps * reference.decode_e2m1(codes)).astype(np.float64)
    residual = t - q
    direct = reference.loss(w - q, h + used * h.diagonal().mean() * np.eye(len(h)))
    assert abs((pivots * residual**2).sum() / direct - 1) < 1e-10  # 96³ float64 operations
    x = np.abs(t / steps)
    half_gap = np.where(x <= 2, 0.25, np.where(x <= 4, 0.5, 1.0)) * steps
    inside = x <= 6
    assert inside.mean() > 0.9 and (np.abs(residual) <= half_gap * (1 + 1e-12))[inside].all()


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_diagonal_hessian_leaves_plain_rounding(format, order):
    rng = np.random.default_rng(4)
    w = rng.standard_normal((8, 64)).astype(np.float32)
    steps = steps_for(w, format)
    codes, t, used = reference.gptq(w, np.diag(rng.lognormal(0, 2, 64)), steps, order, 0.01)
    assert used == 0.01 and np.array_equal(t, w)
    assert np.array_equal(codes, reference.encode_e2m1(w / steps))


def test_visiting_order_is_descending_and_stable():
    h = np.diag([1.0, 4.0, 0.0, 4.0, 2.0, 0.0])
    assert list(reference.visiting_order(h, "natural")) == [0, 1, 2, 3, 4, 5]
    assert list(reference.visiting_order(h, "activation")) == [1, 3, 4, 0, 2, 5]


# ---- Rotation


@pytest.mark.parametrize("k", [2, 16, 32, 128])
def test_rotation_is_the_product_with_scipys_hadamard_matrix(k):
    from scipy.linalg import block_diag, hadamard

    rng = np.random.default_rng(k)
    t = block_diag(*[hadamard(k) / np.sqrt(k)] * (256 // k))
    x = rng.standard_normal((5, 256)).astype(np.float32)
    # log2(k) additions and one product, each within 2^-24 of values bounded by |x| |T|
    bound = (np.log2(k) + 2) * 2.0**-24 * np.abs(x) @ np.abs(t)
    assert (np.abs(reference.rotate(x, k) - x.astype(np.float64) @ t) <= bound).all()
    h = x.T.astype(np.float64) @ x
    rotated = reference.rotate_hessian(h, k)
    assert np.array_equal(rotated, rotated.T)
    assert (np.abs(rotated - t.T @ h @ t) <= (2 * np.log2(k) + 520) * 2.0**-53 * (np.abs(t.T) @ np.abs(h) @ np.abs(t))).all()  # 512: NumPy's own two products


# ---- Searches over storable scales


def test_group_losses_are_the_quadratic_forms_they_are_named_after():
    rng = np.random.default_rng(40)
    errors = rng.standard_normal((5, 6, 16))
    x = rng.standard_normal((300, 96)) @ rng.standard_normal((96, 96))
    h = x.T @ x
    for r in range(5):
        for g in range(6):
            e, block = errors[r, g], h[16 * g : 16 * g + 16, 16 * g : 16 * g + 16]
            wide = {"mse": e @ e, "hessian": e @ np.diag(block.diagonal()) @ e, "hessian_block": e @ block @ e}
            for search, expected in wide.items():
                # 256 products of three factors, each sum and product rounded once; relative to the sum of magnitudes
                bound = 600 * 2.0**-53 * float(np.abs(e) @ np.abs(block if search != "mse" else np.eye(16)) @ np.abs(e))
                assert abs(reference.group_losses(errors, search, h)[r, g] - expected) <= bound


def test_rounding_errors_are_those_of_the_values_that_are_read_back():
    rng = np.random.default_rng(41)
    w = rng.standard_t(3, (8, 96)).astype(np.float32)
    for format, size in FORMATS.items():
        codes, scales, g = reference.quantize(w, format)
        errors = reference.rounding_errors(w.reshape(8, -1, size), scales, format, g).reshape(w.shape)
        steps = scales.view({"nvfp4": ml_dtypes.float8_e4m3fn, "mxfp4": ml_dtypes.float8_e8m0fnu}[format]).astype(np.float32) / g
        steps = np.repeat(steps, size, axis=1)
        assert np.array_equal(errors, w.astype(np.float64) - steps * (w / steps).astype(ml_dtypes.float4_e2m1fn).astype(np.float32))


def test_moved_scales_stop_where_a_step_vanishes_or_overflows():
    for format, g in (("nvfp4", 1.0), ("mxfp4", 1.0), ("mxfp4", 3.0)):
        every = np.arange(1 if format == "nvfp4" else 0, 127 if format == "nvfp4" else 254 if g == 3 else 253)
        for offset in (-300, -8, -1, 0, 1, 7, 300):
            moved = reference.moved_scale(every, offset, format, g)
            steps = reference.steps_of(moved, format, g)
            assert (steps > 0).all() and np.isfinite(np.float32(6) * steps).all()
            free = (every + offset >= every[0]) & (every + offset <= every[-1])
            assert np.array_equal(moved[free], (every + offset)[free])
            assert (moved[~free] == (every[0] if offset < 0 else every[-1])).all()
    with np.errstate(over="ignore"):  # the last one allowed is the last one possible
        assert not np.isfinite(np.float32(6) * reference.steps_of(253, "mxfp4", 1.0)) and not np.isfinite(np.float32(6) * reference.steps_of(254, "mxfp4", 3.0))


def test_quest_takes_numpys_standard_deviation():
    rng = np.random.default_rng(42)
    groups = (rng.standard_normal((300, 32)) + rng.normal(0, 2, (300, 1))) * np.exp2(rng.uniform(-60, 60, (300, 1)))
    exponent = np.log2(groups.astype(np.float32).astype(np.float64).std(-1) * (2.92247856 / 6))
    clear = np.abs(exponent - np.rint(exponent)) > 1e-9  # sums of 32 in another order, 1e-14, and the logarithm
    assert clear.mean() > 0.99
    assert np.array_equal(reference.quest_scale(groups.astype(np.float32))[clear], np.floor(exponent[clear]) + 127)


def test_the_alternating_divisor_falls_by_least_squares_until_nothing_is_gained():
    """Step by step with numpy's least squares in the place of the formula: every divisor that is accepted loses less than the one before."""
    rng = np.random.default_rng(43)
    weights = [rng.standard_t(5, (rows, 64)).astype(np.float32) for rows in (8, 12)]
    flat = np.concatenate([w.reshape(-1) for w in weights]).astype(np.float64)

    def values(g):
        return np.concatenate([reference.dequantize(*reference.quantize(w, "nvfp4", "mse", g=g)[:2], "nvfp4", g).reshape(-1) for w in weights]).astype(np.float64)

    g = min(np.float32(2688) / np.abs(w).max() for w in weights)
    steps = 0
    while True:
        following = np.float32(float(g) / np.linalg.lstsq(values(g)[:, None], flat, rcond=None)[0][0])
        if np.square(flat - values(following)).sum() >= np.square(flat - values(g)).sum():
            break
        g, steps = following, steps + 1
    assert steps > 0
    assert abs(float(reference.alternating_tensor_scale(weights)) / float(g) - 1) <= 2.0**-23  # a sum in another order may push it over one border of float32
    assert reference.alternating_tensor_scale([np.zeros((2, 16), dtype=np.float32)]) == 1
