"""The study's numbers: the formats are the core's where the core has them, Monte Carlo gives the published table, and integrals what Monte Carlo gives."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import integrate, stats

import mrgptq as mg
from mrgptq.study.analysis import Mean, crossover, expected_error, preserved_mass, simulate, simulate_transform
from mrgptq.study.distributions import Empirical, Laplace, Normal, StudentT
from mrgptq.study.grids import E2M1, FORMATS, INT4, Grid, StudyFormat

VALUES = 1 << 20


# ---- Formats


@pytest.mark.parametrize("rule", mg.MX_RULES)
def test_mx_scales_are_the_cores(rule):
    """float32 steps of the core by four-thirds are 2^k / 3; of all others a power of two, so values are equal."""
    x = np.random.default_rng(0).standard_normal((16, 256)).astype(np.float32) * np.float32(2.0) ** np.arange(-8, 8)[:, None]
    expected = mg.quantize(x, "mxfp4", scales=rule).dequantize()
    got = StudyFormat(E2M1, 32, rule).round(x.astype(np.float64).reshape(16, -1, 32)).reshape(x.shape)
    np.testing.assert_allclose(got, expected, rtol=2e-7 if rule == "four-thirds" else 0)


@pytest.mark.parametrize("search", ["absmax", "mse", "four_over_six"])
def test_nvfp4_is_the_cores(search):
    """The core's steps are float32, the study's float64: a value near a tie may go the other way, one in a thousand at most."""
    x = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)
    expected = mg.quantize(x, "nvfp4", scales=search).dequantize().astype(np.float64)
    got = StudyFormat(E2M1, 16, "e4m3", search).round(x.astype(np.float64).reshape(64, -1, 16)).reshape(x.shape)
    assert (np.abs(got - expected) > 1e-6 * np.abs(expected)).mean() < 1e-3


def test_a_grid_rounds_to_the_nearest_ties_to_the_even_index():
    np.testing.assert_array_equal(E2M1.round(np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 9, -0.75, 0.2])), [0, 1, 1, 2, 2, 4, 4, 6, -1, 0])
    np.testing.assert_array_equal(INT4.round(np.array([0.5, 1.5, 2.5, 6.5, 7.4, -3.5])), [0, 2, 2, 6, 7, -4])
    x = np.random.default_rng(2).uniform(-8, 8, 10000)
    grid = Grid("odd", (0, 0.3, 1, 2.2, 5))
    values = np.concatenate([np.array(grid.magnitudes), -np.array(grid.magnitudes)])
    np.testing.assert_array_equal(np.abs(grid.round(x) - x), np.abs(values - x[:, None]).min(1))


def test_int4_scales_by_hand():
    """absmax / 7 as float16; the smallest power of two that does not clip; a tensor scale that puts the largest group's at 448."""
    x = np.array([[1.0, -3.0, 0.7, 14.0], [0.1, 0.2, -0.4, 0.3]])
    for scale, step in (("fp16", np.float16(np.array([2.0, 0.4 / 7])).astype(np.float64)), ("ceil", np.array([2.0, 0.0625]))):
        np.testing.assert_allclose(StudyFormat(INT4, 4, scale).round(x), np.clip(np.rint(x / step[:, None]), -7, 7) * step[:, None], rtol=1e-12)
    divisor = 7 * 448 / 14.0
    step = np.array([448, 13]) / divisor  # 0.4 / 7 * 224 = 12.8, which E4M3 has as 13
    np.testing.assert_allclose(StudyFormat(INT4, 4, "e4m3").round(x), np.clip(np.rint(x / step[:, None]), -7, 7) * step[:, None], rtol=1e-12)


def test_a_search_never_loses_more():
    x = Laplace().sample(4096, 16, np.random.default_rng(3))
    for format in (StudyFormat(E2M1, 16, "e4m3"), StudyFormat(E2M1, 16, "even"), StudyFormat(INT4, 16, "e4m3")):
        plain, searched = (((replace(format, search=search).round(x) - x) ** 2).sum(-1) for search in ("absmax", "mse"))
        assert (searched <= plain + 1e-12).all() and (searched < plain).mean() > 0.02
    assert not StudyFormat(E2M1, 16, "e4m3", "mse").round(np.zeros((3, 16))).any()


# ---- Monte Carlo: the table of an independent simulation, relative errors in thousandths

TABLE = {
    ("e2m1", 32, "floor", "absmax"): (15.56, 17.13, 13.27, 2.15, 13.37),
    ("e2m1", 32, "ceil", "absmax"): (17.01, 11.03, 13.23, 1.83, 13.28),
    ("e2m1", 32, "even", "absmax"): (14.93, 10.96, 12.46, 1.74, 12.53),
    ("e2m1", 32, "four-thirds", "absmax"): (17.02, 10.65, 13.57, 1.85, 13.92),
    ("e2m1", 32, "even", "mse"): (14.68, None, 12.36, None, 12.53),
    ("e2m1", 16, "e4m3", "absmax"): (8.67, 0.70, 9.23, 1.70, 9.04),
    ("e2m1", 16, "e4m3", "four_over_six"): (7.58, None, 7.60, None, 7.57),
    ("e2m1", 16, "e4m3", "mse"): (6.76, 2.53, 6.60, 0.99, 6.61),
    ("e2m1", 32, "real", "absmax"): (10.46, 0, 10.24, None, 10.21),
    ("e2m1", 16, "real", "absmax"): (8.40, None, 9.01, None, 8.85),
    ("int4", 32, "fp16", "absmax"): (14.04, None, 9.01, None, 9.39),
    ("int4", 16, "e4m3", "absmax"): (9.95, None, 7.03, None, 7.45),
    ("int4", 32, "ceil", "absmax"): (30.5, None, 20.5, None, 21.3),
}
"""Laplace: mse, top; Laplace under a Hadamard over the group: mse, top; Normal: mse."""


@pytest.mark.parametrize(("key", "row"), TABLE.items(), ids=[" ".join(map(str, key)) for key in TABLE])
def test_the_published_table_comes_out(key, row):
    """Within 1 % and two standard errors, which what was rounded to two digits after the point may add to; a standard error is a quarter of a percent of what the table has, of the largest values' errors up to one."""
    grid, size, scale, search = key
    format = StudyFormat({"e2m1": E2M1, "int4": INT4}[grid], size, scale, search)
    plain, turned, normal = (simulate(format, distribution, rotation, values=2 * VALUES) for distribution, rotation in ((Laplace(), None), (Laplace(), mg.Hadamard(size)), (Normal(), None)))
    for expected, mean in zip(row, (plain.mse, plain.top, turned.mse, turned.top, normal.mse), strict=True):
        if expected is not None:
            assert abs(1e3 * mean.value - expected) <= 0.01 * expected + 2e3 * mean.standard_error + 0.005, (mean, expected)


def test_the_crossover():
    """NVFP4's scale over Laplace values: below 32 a group a Hadamard loses, from 32 on it gains."""
    expected = {4: (4.53, 5.56), 8: (6.62, 7.59), 16: (8.68, 9.20), 32: (10.64, 10.36), 64: (12.58, 11.19), 128: (14.56, 11.86)}
    rows = list(crossover(FORMATS["nvfp4"], values=VALUES))
    assert [row.group_size for row in rows] == list(expected)
    for row in rows:
        for mean, published in zip((row.plain, row.rotated), expected[row.group_size], strict=True):
            assert abs(1e3 * mean.value - published) <= 0.01 * published + 3e3 * mean.standard_error, row
        assert (row.plain.value < row.rotated.value) == (row.group_size < 32)


@pytest.mark.parametrize(("format", "rotation"), [(FORMATS["mxfp4"], None), (FORMATS["mxfp4"], mg.Hadamard(32)), (StudyFormat(E2M1, 4, "even"), mg.Hadamard(128)), (FORMATS["mxfp4"], mg.Hadamard(16))], ids=["plain", "over the group", "over groups", "inside groups"])
def test_standard_errors_are_those_of_repeated_draws(format, rotation):
    """Sixty runs of other seeds spread as each says; groups that are turned together are one draw."""
    runs = [simulate(format, Laplace(), rotation, values=1 << 15, seed=seed) for seed in range(60)]
    for name in ("mse", "top", "absolute", "absolute_top"):
        values, said = [getattr(run, name).value for run in runs], np.mean([getattr(run, name).standard_error for run in runs])
        assert 0.73 < np.std(values, ddof=1) / said < 1.3  # of 60 draws a spread is known to 9 %


def test_of_random_families_several_matrices_are_tried():
    """The mean over eight, one of them drawn here, and its spread; the others are as they are simulated."""
    format = FORMATS["nvfp4"]
    means = [simulate(format, Laplace(), mg.transform("orthogonal", 16, seed=5 + i), values=1 << 12, seed=5 + i).mse.value for i in range(8)]
    assert simulate_transform(format, Laplace(), "orthogonal", values=1 << 15, seed=5) == Mean(float(np.mean(means)), float(np.std(means, ddof=1) / np.sqrt(8)))
    assert simulate_transform(format, Laplace(), "dct", values=1 << 12, seed=5) == simulate(format, Laplace(), mg.transform("dct", 16), values=1 << 12, seed=5).mse


def test_lemma_1():
    """Without a Hadamard and with a real scale the largest value's error is zero. Under one it is the mean error for values that do not depend on which was the largest; of Laplace values in groups of 16 it is 2 % more."""
    real = StudyFormat(E2M1, 16, "real")
    plain, turned = simulate(real, Laplace(), values=VALUES), simulate(real, Laplace(), mg.Hadamard(16), values=VALUES)
    assert plain.absolute_top.value < 1e-25 and plain.top.value < 1e-25
    assert abs(turned.absolute_top.value / turned.absolute.value - 1) < 0.04  # the lemma takes rotated values for independent of which was largest


# ---- Integrals


@pytest.mark.parametrize(("ours", "scipys"), [(Laplace(), stats.laplace(scale=np.sqrt(0.5))), (Normal(), stats.norm())])
def test_distributions_are_scipys(ours, scipys):
    t = np.array([0.01, 0.3, 1.0, 2.5, 9.0])
    np.testing.assert_allclose(ours.cdf(t), scipys.cdf(t) - scipys.cdf(-t), rtol=1e-12)
    np.testing.assert_allclose(ours.tail(t), 2 * scipys.sf(t), rtol=1e-12)
    np.testing.assert_allclose(ours.density(t), 2 * scipys.pdf(t), rtol=1e-12)
    for order in (0, 1, 2):
        expected = [integrate.quad(lambda x: 2 * x**order * scipys.pdf(x), 0, edge)[0] for edge in t]
        np.testing.assert_allclose(ours.moment(order, t), expected, rtol=1e-9)
    assert abs(float(ours.moment(2, np.asarray(np.inf))) - 1) < 1e-12
    assert stats.kstest(ours.sample(500, 8, np.random.default_rng(0)).ravel(), scipys.cdf).pvalue > 1e-3


@pytest.mark.parametrize("distribution", [Laplace(), Normal()], ids=lambda d: d.name)
@pytest.mark.parametrize(("grid", "size", "scale"), [("e2m1", 32, "even"), ("e2m1", 32, "floor"), ("e2m1", 16, "real"), ("int4", 32, "ceil"), ("int4", 8, "fp16"), ("e2m1", 16, "e4m3")])
def test_absolute_errors_by_one_integral_are_those_of_monte_carlo(grid, size, scale, distribution):
    """Within four standard errors."""
    format = StudyFormat({"e2m1": E2M1, "int4": INT4}[grid], size, scale)
    tensor_amax = np.inf
    if scale == "e4m3":
        tensor_amax = float(np.abs(distribution.sample(VALUES // size, size, np.random.default_rng(0))).max())
    mean, top = expected_error(format, distribution, tensor_amax)
    drawn = simulate(format, distribution, values=VALUES)
    for expected, got in ((mean, drawn.absolute), (top, drawn.absolute_top)):
        assert abs(got.value - expected) <= 4 * got.standard_error + 2e-3 * expected + 1e-25, (got, expected)  # the tensor's largest value is drawn, too


@pytest.mark.parametrize("distribution", [Laplace(), Normal()], ids=lambda d: d.name)
def test_preserved_mass_is_what_is_not_rounded_to_zero(distribution):
    for grid, size in ((E2M1, 32), (INT4, 64), (Grid("coarse", (0, 1, 2)), 16)):
        x = distribution.sample(VALUES // size, size, np.random.default_rng(1))
        kept = np.where(StudyFormat(grid, size, "real").round(x) != 0, x * x, 0).sum() / (x * x).sum()
        assert abs(preserved_mass(grid, size, distribution) - kept) < 1e-3


@pytest.mark.parametrize("grid", [Grid("two", (0, 0.5, 1)), Grid("one", (0, 1))], ids=lambda grid: grid.name)
def test_lemma_2(grid):
    """Mass goes like (log G)² G^-δ for Laplace and sqrt(log G) G^(-δ²) for Normal values: divided by those it settles, over twenty powers of ten and three of mass. For Laplace values near Γ(1 + δ) δ² / 2, which is
    what the largest of G values, log G and a Gumbel variable, leaves of exp(-u)(1 + u + u² / 2) at u = δ times it, but for terms of 1 / log G."""
    delta = StudyFormat(grid, 2, "real").dead_zone
    exponents = (20, 40, 60, 80)
    ratios = {}
    for distribution, form in ((Laplace(), lambda g: np.log(g) ** 2 * g**-delta), (Normal(), lambda g: np.sqrt(np.log(g)) * g ** -(delta**2))):
        ratios[distribution.name] = [preserved_mass(grid, 1 << exponent, distribution) / form(2.0**exponent) for exponent in exponents]
        steps = np.abs(np.diff(np.log(ratios[distribution.name])))
        assert steps[0] < 0.3 and steps[-1] < 0.06
    limit = math.gamma(1 + delta) * delta**2 / 2
    assert limit < ratios["Laplace"][-1] < limit * (1 + 4 / (delta * np.log(2.0**80)))
    assert preserved_mass(grid, 1 << 40, Laplace()) < preserved_mass(grid, 1 << 40, Normal())


def test_laplace_keeps_more_in_small_groups_and_normal_in_large_ones():
    """Where δ is a half; of E2M1's 1 / 24 so little falls to zero that Normal keeps more at every size, and small groups are Laplace's by the error of what is kept."""
    one = Grid("one", (0, 1))
    kept = {size: (preserved_mass(one, size, Laplace()), preserved_mass(one, size, Normal())) for size in (2, 4, 16, 64, 1024)}
    assert all(kept[size][0] > kept[size][1] for size in (2, 4)) and all(kept[size][0] < kept[size][1] for size in (16, 64, 1024))
    assert all(preserved_mass(E2M1, size, Laplace()) < preserved_mass(E2M1, size, Normal()) for size in kept)
    small = replace(FORMATS["nvfp4"], group_size=8)
    assert simulate(small, Laplace(), values=1 << 18).mse.value < simulate(small, Normal(), values=1 << 18).mse.value


# ---- Other distributions


def test_heavier_tails_make_a_rotation_worth_more():
    """Student's t of unit variance; with many degrees of freedom it is Normal."""
    gains = []
    for distribution in (StudentT(3), StudentT(8), StudentT(1e6)):
        plain, turned = (simulate(FORMATS["mxfp4"], distribution, rotation, values=1 << 20).mse.value for rotation in (None, mg.Hadamard(32)))
        gains.append(plain / turned)
    assert gains[0] > gains[1] > gains[2] and abs(gains[2] - 1) < 0.01
    assert abs(StudentT(8).sample(1 << 16, 16, np.random.default_rng(0)).var() - 1) < 0.02


def test_a_tensor_is_its_own_distribution(leaf):
    """Errors of quantising all of it, by the core, are the mean that the draws estimate."""
    weight = leaf.weights["layers.0.mlp.up_proj"]
    drawn = simulate(StudyFormat(E2M1, 32, "even"), Empirical(weight, "up_proj"), values=1 << 20)
    error = (mg.quantize(weight, "mxfp4").dequantize().astype(np.float64) - weight).reshape(-1, 32)
    groups = weight.astype(np.float64).reshape(-1, 32)
    assert abs(drawn.mse.value - ((error**2).sum(-1) / (groups**2).sum(-1)).mean()) < 4 * drawn.mse.standard_error


def test_groups_of_zeros_are_not_drawn():
    """They have no relative error."""
    tensor = np.zeros((4, 64))
    tensor[1, 16:32] = np.arange(16) + 1
    drawn = simulate(FORMATS["nvfp4"], Empirical(tensor), values=1 << 10).mse
    assert 0 < drawn.value < 0.05 and drawn.standard_error < 1e-12  # there is one group to draw
    turned = simulate(FORMATS["nvfp4"], Empirical(tensor), mg.Hadamard(64), values=1 << 10)
    error = mg.quantize(tensor[1:2], "nvfp4", rotation=mg.Hadamard(64)).dequantize(unrotate=True)[0, 16:32] - tensor[1, 16:32]
    assert turned.mse.value == pytest.approx((error**2).sum() / (tensor[1] ** 2).sum(), rel=1e-4)  # of the one group in four that has a square; the core's steps are float32
    assert turned.top.value == pytest.approx(error[15] ** 2 / 256, rel=1e-2)


def test_of_a_single_value_the_standard_error_is_not_known():
    assert Mean.of(np.array([2.0])) == Mean(2.0, np.inf)


@pytest.mark.parametrize("rotation", [mg.Hadamard(8), mg.Hadamard(64), mg.transform("dct", 16), mg.Identity()], ids=repr)
def test_blocks_and_groups_may_differ_in_size(rotation):
    """By hand: turned as a matrix, rounded in groups of 16, turned back."""
    span = max(16, rotation.block_size or 16)
    x = Laplace().sample(256, span, np.random.default_rng(0))
    turned = rotation.apply(x).astype(np.float64)
    format = StudyFormat(E2M1, 16, "even")
    error = rotation.apply_inverse(format.round(turned.reshape(256, -1, 16)).reshape(x.shape) - turned).astype(np.float64).reshape(-1, 16)
    expected = ((error**2).sum(-1) / (x.reshape(-1, 16) ** 2).sum(-1)).mean()
    assert abs(simulate(format, Laplace(), rotation, values=256 * span).mse.value / expected - 1) < 1e-9


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: StudyFormat(E2M1, 16, "e5m2"), "scale"),
        (lambda: StudyFormat(E2M1, 0, "real"), "group_size is 0"),
        (lambda: StudyFormat(E2M1, 16, "real", "mse"), "too many of scale"),
        (lambda: StudyFormat(E2M1, 16, "even", "best"), "search"),
        (lambda: StudyFormat(E2M1, 32, "even", "four_over_six"), 'scale "even"'),
        (lambda: StudyFormat(INT4, 16, "e4m3", "four_over_six"), "grid is int4"),
        (lambda: Grid("flat", (0, 1, 1)), "ascending"),
        (lambda: Grid("high", (1, 2)), "from 0"),
        (lambda: FORMATS["nvfp4"].round(np.ones((2, 8))), "group of 16"),
        (lambda: simulate(StudyFormat(E2M1, 24, "even"), Laplace(), mg.Hadamard(16)), "one must divide the other"),
        (lambda: expected_error(StudyFormat(E2M1, 16, "e4m3"), Laplace()), "tensor_amax is not given"),
        (lambda: expected_error(StudyFormat(E2M1, 16, "e4m3", "mse"), Laplace()), "searches its scale"),
        (lambda: StudentT(2), "more than 2"),
        (lambda: Empirical(np.zeros((2, 4))), "tensor is zero"),
        (lambda: simulate(FORMATS["nvfp4"], Empirical(np.ones((2, 8)))), "tensor has 8 columns; a group has 16"),
        (lambda: simulate(FORMATS["nvfp4"], Empirical(np.r_[np.zeros(16), 1.0])), "no group of 16 columns that is not zero"),
        (lambda: simulate(FORMATS["nvfp4"], Laplace(), values=0), "values is 0"),
        (lambda: expected_error(FORMATS["mxfp4"], StudentT(5)), "distribution is Student t, 5; integrals are known of Laplace and Normal"),
        (lambda: preserved_mass(E2M1, 32, StudentT(5)), "integrals are known of"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()
