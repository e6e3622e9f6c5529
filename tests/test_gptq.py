"""The compiled GPTQ against reference.py on every layer of leaf: the same codes in float64, and in float32 the first difference of a row only where rounding may decide."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

import mrgptq as mg
from mrgptq import reference

TIES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
CONFIGURATIONS = [(format, rotation, order) for format, paper in (("nvfp4", 16), ("mxfp4", 32)) for rotation in (None, paper, 128) for order in ("natural", "activation")]


@dataclass
class Solved:
    """One layer by reference.py, in the rotated basis."""

    weight: np.ndarray
    hessian: np.ndarray
    steps: np.ndarray
    codes: np.ndarray
    values: np.ndarray  # what was rounded
    visit: np.ndarray
    lower: np.ndarray


@pytest.fixture(scope="module", params=CONFIGURATIONS, ids=lambda c: "-".join(map(str, c)))
def solved(request, leaf):
    """(recipe, {layer: Solved}) for one configuration."""
    format, rotation, order = request.param
    layers = {}
    for name, w in leaf.weights.items():
        w, h = reference.rotate(w, rotation), reference.rotate_hessian(leaf.hessians[name], rotation)
        g = reference.tensor_scale(w, format)
        scales = reference.find_scales(w, format, g=g)
        steps = np.repeat(reference.steps_of(scales, format, g), reference.GROUP_SIZE[format], axis=1)
        codes, values, used = reference.gptq(w, h, steps, order, 0.01)
        assert used == 0.01
        visit, lower, _ = reference.factorise(h, order, 0.01)
        layers[name] = Solved(w, h, steps, codes, values, visit, lower)
    return mg.Recipe(format, rotation=rotation, scales="absmax", order=order), layers


def quantized(leaf, name, recipe):
    return mg.quantize_layer(leaf.weights[name], leaf.hessians[name], recipe)


def relative_error(layer, codes):
    """The relative error of codes in float64, and how far the report may be from it: it rounds E = W - Ŵ to float32, once an entry, so its numerator is off by at most
    2 u Σ |e| |H| |e| (u = 2^-24); u²'s and float64 sums fit into the tenth more."""
    w, h = layer.weight.astype(np.float64), layer.hessian
    e = w - layer.steps * reference.decode_e2m1(codes)  # a product in float32, as a reader decodes it
    energy = np.einsum("ij,jk,ik->", w, h, w, optimize=True)
    slack = 2.2 * 2.0**-24 * np.einsum("ij,jk,ik->", np.abs(e), np.abs(h), np.abs(e), optimize=True) / energy
    return np.einsum("ij,jk,ik->", e, h, e, optimize=True) / energy, slack


def test_float64_gives_the_codes_of_the_reference(leaf, solved):
    """The two Cholesky factors differ by float64 rounding, 1e-13 of a step, so a code could differ only at a value that close to a tie; none of leaf's 786 432 weights has one."""
    recipe, layers = solved
    for name, layer in layers.items():
        q = quantized(leaf, name, replace(recipe, precision="float64"))
        assert np.array_equal(mg.unpack(q.codes), layer.codes), name
        assert np.array_equal(q.scales, reference.find_scales(layer.weight, recipe.format)), name
        assert q.report.method == "gptq" and q.report.damping == 0.01
        expected, slack = relative_error(layer, layer.codes)
        assert abs(q.report.relative_error - expected) <= min(slack, 1e-6 * expected), name


def gamma(n, u):
    return n * u / (1 - n * u)


def may_differ(layer):
    """(rows, position) bool: decisions of the float32 solver that rounding may turn over, provided that all earlier codes of the row are the reference's.

    Notation: l = unit lower factor, e = w - q, both by reversed position; the reference rounds t = w + Σ l e over the m <= n - 1 positions visited before.

    float32. Each term carries three roundings (l to float32, e to float32, their product) and takes part in at most m additions, whatever their order and whether fused or
    not; adding w is one more, and dividing by the step another. So the computed quotient is off by at most gamma_{n+4}(u = 2^-24) (|w| + Σ |l| |e|) / step.

    The factor. LAPACK's, and ours in float64, is that of a matrix within |E| <= gamma_{n+1}(2^-53) |L| |L|^T of R (Higham, Accuracy and Stability, theorem 10.3). Ours sums in float32, in
    chains of 128 products of factors rounded to it, what lies in earlier panels of 128 positions, so here its E grows by gamma_131(2^-24) times that part of |L| |L|^T. To first order
    ΔL = L tril(L^-1 E L^-T), diagonal halved, hence |ΔL| <= |L| tril(|L^-1| |E| |L^-T|), and |Δ(L_ki / L_ii)| <= (|ΔL_ki| + |l_ki| |ΔL_ii|) / L_ii; the two factors' E are added up. The
    reference's own float64 sum is covered by one more u in the first part.
    """
    n = len(layer.visit)
    columns = layer.visit[::-1]
    lower, size = layer.lower, np.abs(layer.lower)
    unit = lower / lower.diagonal()
    off = 2 * gamma(n + 1, 2.0**-53) * size @ size.T
    for end in range(128, n, 128):
        off[end : end + 128, end:] += gamma(131, 2.0**-24) * (size[end : end + 128, :end] @ size[end:, :end].T)
    off = np.tril(off.T) + np.tril(off.T, -1).T
    inverse = np.abs(np.linalg.inv(lower))
    change = size @ np.tril(inverse @ off @ inverse.T)
    unit_change = (change + np.abs(unit) * change.diagonal()) / lower.diagonal()
    error = np.abs(layer.weight.astype(np.float64) - layer.steps * reference.decode_e2m1(layer.codes))[:, columns]
    weight, steps, values = (np.abs(a.astype(np.float64))[:, columns] for a in (layer.weight, layer.steps, layer.values))
    bound = (gamma(n + 5, 2.0**-24) * (weight + error @ np.tril(np.abs(unit), -1)) + error @ np.tril(unit_change, -1)) / steps
    to_tie = np.abs((values / steps)[..., None] - TIES).min(-1)
    return to_tie <= bound


def test_float32_parts_from_the_reference_only_where_a_value_lies_within_rounding_of_a_tie(leaf, solved):
    recipe, layers = solved
    rows, decisions = [], []  # that the bound leaves open, by layer
    for name, layer in layers.items():
        q = quantized(leaf, name, replace(recipe, precision="float32"))
        codes = mg.unpack(q.codes)
        columns = layer.visit[::-1]
        differs = (codes != layer.codes)[:, columns]
        near = may_differ(layer)
        first = differs.shape[1] - 1 - differs[:, ::-1].argmax(1)  # the highest reversed position is visited first
        for row in np.flatnonzero(differs.any(1)):
            assert near[row, first[row]], (name, row, first[row])
        # The report tells the truth about its own codes; those of a layer without a difference are the reference's.
        expected, slack = relative_error(layer, codes)
        assert abs(q.report.relative_error - expected) <= min(slack, 1e-6 * expected), name
        (rows if len(layer.visit) <= 128 else decisions).append(near.any(1).mean() if len(layer.visit) <= 128 else near.mean())
    # The bound is a worst case, and yet it leaves nineteen rows in twenty no way to differ where no product of the factor is float32, and nineteen decisions in twenty elsewhere.
    assert np.mean(rows) < 0.05 and np.mean(decisions) < 0.05


def test_the_precision_of_a_factor_is_that_of_its_products(leaf):
    """Three panels of 128 columns: the pivots, and the solver's own account of its loss with them, differ in float32's digits."""
    name = next(name for name in leaf.weights if name.endswith("down_proj"))
    recipe = mg.Recipe(precision="float32", damping=0.1, scales="absmax")
    factors = {precision: mg.make_factor(leaf.hessians[name], replace(recipe, precision=precision)) for precision in ("float32", "float64")}
    assert [factor.precision for factor in factors.values()] == list(factors)
    single, double = (mg.quantize_layer(leaf.weights[name], None, recipe, factor=factor).report.damped_errors[-1] for factor in factors.values())
    assert single != double and abs(single - double) < double / 128  # not even if a row of the 128 parts


# ---- First principles, on columns few enough to try everything


def few_live(seed, live, cols, rows=6, rest="decoupled", spread=1.0):
    """A weight, and an H in which `live` columns of the first group are coupled to each other alone; the rest is uncoupled or dead."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, cols)).astype(np.float32)
    columns = np.sort(rng.permutation(16)[:live])
    x = rng.standard_normal((3 * live, live)) @ (np.eye(live) + spread * rng.standard_normal((live, live)))
    h = np.diag(rng.lognormal(0, 1, cols)) if rest == "decoupled" else np.zeros((cols, cols))
    h[np.ix_(columns, columns)] = x.T @ x
    return w, h, columns


def steps_of(q):
    return np.repeat(reference.steps_of(q.scales, q.format, q.tensor_scale), reference.GROUP_SIZE[q.format], axis=1).astype(np.float64)


def best_losses(w, steps, h):
    """Least e H e^T of each row over every combination of E2M1 values, 15 of them a column, each times its step in float32 as a reader decodes it."""
    values = np.unique(reference.decode_e2m1(np.arange(16))).astype(np.float64)
    combinations = np.stack(np.meshgrid(*[values] * w.shape[1], indexing="ij"), -1).reshape(-1, w.shape[1])
    assert len(combinations) == 15 ** w.shape[1]
    best = []
    for row, step in zip(w.astype(np.float64), steps, strict=True):
        e = row - (combinations * step).astype(np.float32)
        best.append(np.einsum("ij,ij->i", e @ h, e).min())
    return np.array(best)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("rest", ["decoupled", "dead"])
@pytest.mark.parametrize("live", [1, 2, 3, 4])
def test_the_loss_is_never_below_brute_force_and_equals_it_for_one_live_column(live, rest, format, precision):
    w, h, columns = few_live(live, live, 64, rest=rest)
    q = mg.quantize_layer(w, h, mg.Recipe(format, scales="absmax", precision=precision, damping=0.001))
    steps = steps_of(q)
    alone = np.setdiff1d(np.arange(64), columns)
    rounded = (steps * reference.decode_e2m1(reference.encode_e2m1(w / steps))).astype(np.float32)  # uncoupled columns: the nearest value is the best
    best = best_losses(w[:, columns], steps[:, columns], h[np.ix_(columns, columns)]).sum() + ((w.astype(np.float64) - rounded)[:, alone] ** 2 * h.diagonal()[alone]).sum()
    got = q.report.relative_error * np.einsum("ij,jk,ik->", w.astype(np.float64), h, w.astype(np.float64))
    e = np.abs(w.astype(np.float64) - q.dequantize())
    slack = 2.2 * 2.0**-24 * np.einsum("ij,jk,ik->", e, np.abs(h), e)  # the report rounds E to float32, as in relative_error
    assert got >= best - slack
    if live == 1:
        assert got <= best + slack
    assert q.report.dead_columns == (64 - live if rest == "dead" else 0)
    assert np.array_equal(mg.unpack(q.codes)[:, alone], reference.encode_e2m1(w / steps)[:, alone])


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_each_code_is_the_best_one_while_the_columns_after_it_are_still_free(format, order, precision):
    """GPTQ's definition: a column takes the code that loses least if all columns not yet visited could follow with real values. Tried for every code by solving for those values."""
    w, h, columns = few_live(11, 4, 32, rows=40, spread=2.0)
    q = mg.quantize_layer(w, h, mg.Recipe(format, scales="absmax", order=order, precision=precision, damping=0))
    codes, steps = mg.unpack(q.codes), steps_of(q)
    visit = [c for c in (columns if order == "natural" else columns[np.argsort(-h.diagonal()[columns], kind="stable")])]
    greedy_is_not_rounding = 0
    for row in range(len(w)):
        fixed = []
        for position, column in enumerate(visit):
            free = visit[position + 1 :]
            losses = []
            for code in range(15):  # 8 is the same value as 0
                code += code >= 8
                done = [*fixed, w[row, column] - steps[row, column] * float(reference.decode_e2m1(code))]
                e, seen = np.array(done), visit[: position + 1]
                h_done, h_cross, h_free = h[np.ix_(seen, seen)], h[np.ix_(free, seen)], h[np.ix_(free, free)]
                follow = np.linalg.solve(h_free, h_cross @ e) if free else np.zeros(0)
                losses.append((e @ h_done @ e - (h_cross @ e) @ follow, code))
            best, second = sorted(losses)[:2]
            assert second[0] - best[0] > 1e-6 * second[0]  # no tie within float32 rounding of four terms, so the best is one
            assert codes[row, column] == best[1]
            fixed.append(w[row, column] - steps[row, column] * float(reference.decode_e2m1(best[1])))
            greedy_is_not_rounding += best[1] != reference.encode_e2m1(w[row, column] / steps[row, column])
    assert greedy_is_not_rounding > 10


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_a_diagonal_hessian_leaves_plain_rounding_exact_ties_included(format, order, precision):
    """Nothing is fed back, so the weights themselves are rounded. They are ties times steps of few digits, exact in float32: a product with a rounded reciprocal would move them."""
    rng = np.random.default_rng(12)
    group = reference.GROUP_SIZE[format]
    steps = rng.integers(8, 16, (30, 128 // group)) / 2.0 ** rng.integers(0, 6, (30, 128 // group)) if format == "nvfp4" else 2.0 ** rng.integers(-6, 6, (30, 128 // group))
    multiples = rng.choice(np.concatenate([TIES, -TIES]), (30, 128))
    multiples[:, ::group] = 6  # the largest of each group, so that absmax finds the step again
    w = (np.repeat(steps, group, axis=1) * multiples).astype(np.float32)
    q = mg.quantize_layer(w, np.diag(rng.lognormal(0, 2, 128)), mg.Recipe(format, scales="absmax", mx_rule="ceil", order=order, precision=precision), tensor_scale=1.0)
    assert np.array_equal(steps_of(q), np.repeat(steps, group, axis=1))
    to_even = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5: 4, 6: 6}
    expected = [[np.sign(m) * to_even[abs(m)] for m in row] for row in multiples]
    assert np.array_equal(q.dequantize(), (steps_of(q) * expected).astype(np.float32))


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize(("first", "second"), [(1, 2), (3, 200)])  # in one block of 128 columns, and from one block to another
def test_float64_tells_a_value_from_a_tie_that_float32_cannot(format, first, second):
    """2.5 is rounded to 2 and leaves 0.5, of which the second column gets the part H[first, second] = 1/2 ± 2^-30: its value is a tie ± 2^-31, all exact in float64."""
    h = np.tile(np.eye(256), (2, 1, 1))
    h[0, first, second] = h[0, second, first] = 0.5 + 2.0**-30
    h[1, first, second] = h[1, second, first] = 0.5 - 2.0**-30
    w = np.zeros((1, 256), dtype=np.float32)
    w[:, :: reference.GROUP_SIZE[format]] = 6  # every step is 1
    w[:, first] = 2.5
    for matrix, weight, expected in ((h[0], 1.0, 1.5), (h[1], 1.5, 1.5)):  # ties 1.25 and 1.75, which the even codes 1 and 2 would take
        w[:, second] = weight
        recipe = mg.Recipe(format, scales="absmax", mx_rule="ceil", order="natural", damping=0, precision="float64")
        values = mg.quantize_layer(w, matrix, recipe, tensor_scale=1.0).dequantize()[0]
        assert (values[first], values[second]) == (2.0, expected)


# ---- What a positive factor on H must not change


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("exponent", [-300, -20, 1, 300])
def test_powers_of_two_on_the_hessian_change_no_byte(leaf, exponent, precision):
    name = "layers.1.self_attn.o_proj"
    recipe = mg.Recipe("mxfp4", rotation=32, precision=precision)
    plain, scaled = (mg.quantize_layer(leaf.weights[name], h, recipe) for h in (leaf.hessians[name], leaf.hessians[name] * 2.0**exponent))
    assert np.array_equal(plain.codes, scaled.codes) and np.array_equal(plain.scales, scaled.scales)
    assert plain.report.relative_error == scaled.report.relative_error
    assert scaled.report.damping == 0.01


@pytest.mark.parametrize("factor", [1 / 3, 1e-12, 2048.0, 7e9])
def test_any_positive_factor_on_the_hessian_leaves_the_codes(leaf, factor):
    """The factor enters L by float64 rounding alone; no value of this layer is within 1e-12 of a tie."""
    for name in ("layers.1.self_attn.o_proj", "layers.2.mlp.gate_proj"):
        recipe = mg.Recipe("nvfp4", rotation=16, precision="float64")
        plain, scaled = (mg.quantize_layer(leaf.weights[name], h, recipe) for h in (leaf.hessians[name], leaf.hessians[name] * factor))
        assert np.array_equal(plain.codes, scaled.codes)
        assert abs(scaled.report.relative_error / plain.report.relative_error - 1) < 1e-12
