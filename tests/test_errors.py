"""Bad arrays, names and numbers are refused at the door, in a sentence that says which argument, what was given and what is allowed; and nothing is changed by then."""

import re

import numpy as np
import pytest

import mrgptq as mg
from mrgptq import _core

ROWS, COLS = 6, 64


@pytest.fixture
def w():
    return np.random.default_rng(0).standard_normal((ROWS, COLS)).astype(np.float32)


@pytest.fixture
def h():
    x = np.random.default_rng(1).standard_normal((200, COLS))
    return x.T @ x / 200


def put(array, value, *where):
    changed = array.copy()
    changed[where] = value
    return changed


# Every function that takes a matrix, with the name it calls it by.
TAKES_A_MATRIX = {
    "quantize_layer": (lambda a, h: mg.quantize_layer(a, h), "weight"),
    "quantize_layer rtn": (lambda a, h: mg.quantize_layer(a, None, "rtn"), "weight"),
    "quantize_layer best": (lambda a, h: mg.quantize_layer(a, h, "best"), "weight"),
    "quantize": (lambda a, h: mg.quantize(a), "weight"),
    "alternating_tensor_scale": (lambda a, h: mg.alternating_tensor_scale([a]), "weights"),
}
TAKES_ANY_RANK = {
    "round_activations": (lambda a, h: mg.round_activations(a, "mxfp4"), "x"),
    "Hadamard.apply": (lambda a, h: mg.Hadamard(32).apply(a), "x"),
    "Hessian.update": (lambda a, h: mg.Hessian(COLS).update(a), "x"),
}
DOORS = TAKES_A_MATRIX | TAKES_ANY_RANK


def refused(door, array, h, error, words):
    call, name = DOORS[door]
    before = array.tobytes() if isinstance(array, np.ndarray) else None
    with pytest.raises(error, match=words.format(name=name)):
        call(array, h)
    assert before is None or array.tobytes() == before


# ---- The weight, and whatever else comes in as data


@pytest.mark.parametrize("door", TAKES_A_MATRIX)
def test_wrong_rank(door, w, h):
    for array, rank in ((w[0], 1), (w[None], 3), (w[0, 0], 0)):
        refused(door, array, h, ValueError, rf"{{name}} has rank {rank} \(shape .*\); expected rank 2, \(rows, cols\)")


@pytest.mark.parametrize("door", DOORS)
def test_empty(door, w, h):
    refused(door, w[:, :0], h, ValueError, rf"{{name}} is empty: its shape is \({ROWS}, 0\)")
    if door == "Hessian.update":
        mg.Hessian(COLS).update(w[:0])  # a batch of no tokens is one: it adds nothing
    else:
        refused(door, w[:0], h, ValueError, rf"{{name}} is empty: its shape is \(0, {COLS}\)")


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("dtype", ["int64", "uint8", "uint16", "complex64", "bool", "object", "str", "longdouble"])
def test_wrong_dtype(door, dtype, w, h):
    array = w.astype(dtype)
    refused(door, array, h, TypeError, f"{{name}} has dtype {array.dtype}; allowed: float32, float64, float16, bfloat16")


@pytest.mark.parametrize("door", DOORS)
def test_what_is_no_array(door, h):
    refused(door, [[1.0, 2.0], [3.0]], h, TypeError, r"{name} \(list\) does not convert to a numpy array")
    refused(door, None, h, TypeError, "{name} has dtype object")


def test_bfloat16_bits_of_another_dtype(w, h):
    with pytest.raises(TypeError, match='weight has dtype float32; dtype="bfloat16" takes the bits as uint16'):
        mg.quantize_layer(w, h, dtype="bfloat16")
    with pytest.raises(ValueError, match="unknown dtype 'float8'; known: bfloat16"):
        mg.quantize_layer(w.view(np.uint16), h, dtype="float8")


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_non_finite_with_its_row_and_column(door, dtype, value, w, h):
    bad = put(put(w.astype(dtype), float(value), 4, 3), float(value), 2, 61)  # the first one in row-major order is told
    refused(door, bad, h, ValueError, f"{{name}} is {value} at row 2, column 61; every value must be finite in float32")
    refused(door, np.asfortranarray(bad), h, ValueError, f"{{name}} is {value} at row 2, column 61")


@pytest.mark.parametrize("door", TAKES_ANY_RANK)
def test_non_finite_in_more_axes_with_its_index(door, w, h):
    refused(door, put(w.reshape(3, 2, COLS), np.nan, 1, 1, 7), h, ValueError, r"{name} is nan at index \(1, 1, 7\)")


@pytest.mark.parametrize("door", DOORS)
def test_float64_beyond_float32(door, w, h):
    refused(door, put(w.astype(np.float64), -1e39, 3, 5), h, ValueError, "{name} is -inf at row 3, column 5; every value must be finite in float32")


def test_columns_that_no_group_or_rotation_divides(w, h):
    for call, words in (
        (lambda: mg.quantize(w[:, :40]), "weight has 40 columns; nvfp4 needs a multiple of 16"),
        (lambda: mg.quantize_layer(w[:, :40], h[:40, :40], format="mxfp4"), "weight has 40 columns; mxfp4 needs a multiple of 32"),
        (lambda: mg.round_activations(w[:, :40], "mxfp4"), "x has 40 columns; mxfp4 needs a multiple of 32"),
        (lambda: mg.Hadamard(64).apply(w[:, :48]), "x has 48 columns; a rotation of block size 64 needs"),
        (lambda: mg.Hadamard(64).apply_hessian(h[:48, :48]), "hessian has 48 columns; a rotation of block size 64 needs"),
        (lambda: mg.make_factor(h[:40, :40], "mr-gptq"), "hessian has 40 columns; nvfp4 needs a multiple of 16"),
        (lambda: mg.Hessian(32).update(w), "x has 64 columns; this Hessian has 32"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


# ---- The Hessian


@pytest.mark.parametrize("recipe", ["rtn", "gptq", "mr-gptq", "best"])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda h: h[:, :32], ValueError, r"hessian has shape \(64, 32\); it must be square, \(cols, cols\)"),
        (lambda h: h[0], ValueError, r"hessian has shape \(64,\); it must be square"),
        (lambda h: np.zeros((0, 0)), ValueError, r"hessian has shape \(0, 0\)"),
        (lambda h: h[:32, :32], ValueError, r"hessian has shape \(32, 32\); a weight of 64 columns needs \(64, 64\)"),
        (lambda h: h[:32, :32].tolist(), ValueError, r"hessian has shape \(32, 32\); a weight of 64 columns needs \(64, 64\)"),
        (lambda h: mg.Hessian(128), ValueError, r"hessian has shape \(128, 128\); a weight of 64 columns needs \(64, 64\)"),
        (lambda h: put(h, np.nan, 5, 6), ValueError, "hessian is nan at row 5, column 6; every entry must be finite"),
        (lambda h: put(h, np.inf, 63, 0), ValueError, "hessian is inf at row 63, column 0"),
        (lambda h: put(h, h[2, 9] + 1e-3, 2, 9), ValueError, r"hessian is not symmetric: entries \((2, 9|9, 2)\) and .* allowed is a difference of 1e-5 of the largest entry"),
        (lambda h: np.triu(h), ValueError, "hessian is not symmetric"),
        (lambda h: put(h, -1e-9, 7, 7), ValueError, "hessian has the negative diagonal entry -1e-09 at column 7"),
        (lambda h: -h, ValueError, "hessian has the negative diagonal entry"),
        (lambda h: put(h, 0.0, 7, 7), ValueError, "hessian has 0 on its diagonal at column 7, but .* beside it; a second moment's column is then all zero"),
        (lambda h: h.astype(complex), TypeError, "hessian has dtype complex128; allowed: real numbers"),
        (lambda h: h > 0, TypeError, "hessian has dtype bool; allowed: real numbers"),
        (lambda h: h.astype(object), TypeError, "hessian has dtype object"),
        (lambda h: "hessian", TypeError, "hessian has dtype <U7"),
        (lambda h: [[1.0], [1.0, 2.0]], TypeError, r"hessian \(list\) does not convert"),
    ],
)
def test_hessians_that_are_none(recipe, change, error, words, w, h):
    bad = change(h)
    before = bad.tobytes() if isinstance(bad, np.ndarray) else None
    with pytest.raises(error, match=words):
        mg.quantize_layer(w, bad, recipe)
    assert before is None or bad.tobytes() == before


def test_a_diagonal_that_underflowed_is_a_dead_column(w, h):
    """x of column 9 around 1e-24: its square vanishes in float32, its products with the others do not."""
    tiny = h.copy()
    tiny[9], tiny[:, 9] = h[9] * 1e-24, h[:, 9] * 1e-24
    tiny[9, 9] = 0
    assert mg.quantize_layer(w, tiny, "gptq").report.dead_columns == 1


def test_asymmetry_within_a_hundred_thousandth_is_a_rounding(w, h):
    """Half of the allowed difference passes, and the two halves are taken together; twice of it does not pass."""
    largest = np.abs(h).max()
    slightly = put(h, h[2, 9] + 0.5e-5 * largest, 2, 9)
    symmetric = (slightly + slightly.T) / 2
    assert np.array_equal(mg.quantize_layer(w, slightly).codes, mg.quantize_layer(w, symmetric).codes)
    with pytest.raises(ValueError, match="not symmetric"):
        mg.quantize_layer(w, put(h, h[2, 9] + 2e-5 * largest, 2, 9))


def test_inputs_whose_squares_overflow_are_refused_before_they_reach_a_code(w):
    x = np.ones((10, COLS), dtype=np.float32)
    x[:, 3] = 1e25
    second = mg.Hessian(COLS)
    second.update(x)
    with pytest.raises(ValueError, match="hessian is inf at row 3, column 3"):
        mg.quantize_layer(w, second)


def test_a_missing_hessian_and_foreign_objects(w, h):
    with pytest.raises(ValueError, match='hessian is None; only a recipe with the solver "rtn" does without'):
        mg.quantize_layer(w, None)
    with pytest.raises(TypeError, match="factor is ndarray; it must be what make_factor returned"):
        mg.quantize_layer(w, h, factor=h)
    with pytest.raises(TypeError, match=r"rotation is 16; it must be None, Identity\(\) or Hadamard"):
        mg.Factor(h, rotation=16)
    for recipe in (3, None, {"format": "nvfp4"}):
        with pytest.raises(TypeError, match=f"recipe is {type(recipe).__name__}; it must be a Recipe or a name: rtn, gptq, mr-gptq, best, best-online$"):
            mg.quantize_layer(w, h, recipe)
    with pytest.raises(ValueError, match="format is 'nvfp4', but the recipe is for 'mxfp4'"):
        mg.quantize_layer(w, h, mg.Recipe("mxfp4"), format="nvfp4")


@pytest.mark.parametrize("scales", ["hessian", "hessian_block"])
def test_scales_that_weigh_errors_need_something_to_weigh_them_by(scales, w, h):
    recipe = mg.Recipe(solver="rtn", scales=scales)
    with pytest.raises(ValueError, match=f'hessian is None; the scales "{scales}" weigh errors by it'):
        mg.quantize_layer(w, None, recipe)
    assert mg.quantize_layer(w, h, recipe).report.scales == scales


CROSSED = mg.Recipe(cross=0.5)


@pytest.mark.parametrize(
    ("cross", "recipe", "words"),
    [
        (lambda h: h[:, :32], CROSSED, r"cross has shape \(64, 32\); a weight of 64 columns needs \(64, 64\)"),
        (lambda h: h[0], CROSSED, r"cross has shape \(64,\); a weight of 64 columns needs \(64, 64\)"),
        (lambda h: put(h, np.nan, 5, 6), CROSSED, r"cross\[5, 6\] is not finite"),
        (lambda h: put(put(h, -np.inf, 7, 0), np.inf, 6, 9), CROSSED, r"cross\[6, 9\] is not finite"),
        (lambda h: h, mg.Recipe(), "cross is given, but the recipe's cross, how far the target moves, is 0"),
        (lambda h: h, mg.Recipe.named("rtn"), 'cross is given, but the recipe\'s solver is "rtn"; it needs "gptq"'),
    ],
)
def test_cross_moments_that_are_none(cross, recipe, words, w, h):
    bad = cross(h)
    before = bad.tobytes()
    with pytest.raises(ValueError, match=words):
        mg.quantize_layer(w, h, recipe, cross=bad)
    assert bad.tobytes() == before


# ---- Names and numbers


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda w, h: mg.quantize(w, "fp8"), "unknown format 'fp8'; known: mxfp4, nvfp4"),
        (lambda w, h: mg.quantize_layer(w, h, format="fp8"), "unknown format 'fp8'; known: mxfp4, nvfp4"),
        (lambda w, h: mg.round_activations(w, "fp8"), "unknown format 'fp8'; known: mxfp4, nvfp4"),
        (lambda w, h: mg.quantize(w, scales="best"), "unknown scales for nvfp4 'best'; known: absmax, fpquant_mse, mse, four_over_six$"),
        (lambda w, h: mg.quantize(w, "mxfp4", scales="best"), "unknown scales for mxfp4 'best'; known: absmax, fpquant_mse, mse, quest, floor, ceil, even, four-thirds$"),
        (lambda w, h: mg.round_activations(w, "nvfp4", rule="best"), "unknown rule for nvfp4 'best'; known: absmax, fpquant_mse, mse, four_over_six$"),
        (lambda w, h: mg.Activations("mxfp4", rule="best"), "unknown rule for mxfp4 'best'; known: absmax, fpquant_mse, mse, quest$"),
        (lambda w, h: mg.Activations("nvfp4", rule="even"), "unknown rule for nvfp4 'even'; known: absmax, fpquant_mse, mse, four_over_six$"),
        (lambda w, h: mg.quantize(w, "mxfp4", mx_rule="round"), "unknown mx_rule 'round'; known: floor, ceil, even, four-thirds"),
        (lambda w, h: mg.round_activations(w, "mxfp4", mx_rule="round"), "unknown mx_rule 'round'; known: floor, ceil, even, four-thirds"),
        (lambda w, h: mg.Factor(h, order="up"), "unknown order 'up'; known: natural, activation, group$"),
        (lambda w, h: mg.Factor(h, order="group"), 'group_size is None; the order "group" needs the number of columns in a group'),
        (lambda w, h: mg.Factor(h, order="group", group_size=0), 'group_size is 0; the order "group" needs'),
        (lambda w, h: mg.Factor(h, order="group", group_size=True), 'group_size is True; the order "group" needs'),
        (lambda w, h: mg.Factor(h, order="group", group_size=16.0), r'group_size is 16\.0; the order "group" needs'),
        (lambda w, h: mg.Factor(h, order="group", group_size=48), "hessian has 64 columns; groups of 48 do not divide them"),
        (lambda w, h: mg.quantize_layer(w, h, "awq"), "unknown recipe 'awq'; known: rtn, gptq, mr-gptq, best, best-online$"),
        (lambda w, h: mg.make_factor(h, "awq"), "unknown recipe 'awq'; known: rtn, gptq, mr-gptq, best, best-online$"),
        (lambda w, h: mg.Recipe.named("gptq", dialect="exl2"), "unknown dialect 'exl2'; known: compressed-tensors, fp_quant, mrgptq$"),
        (lambda w, h: mg.save("never", {}, dialect="exl2"), "unknown dialect 'exl2'; known: compressed-tensors, fp_quant, mrgptq$"),
        (lambda w, h: mg.Factor(h, damping=-1), "damping is -1; it must be a finite number from 0 on"),
        (lambda w, h: mg.Factor(h, damping=float("nan")), "damping is nan; it must be a finite number from 0 on"),
    ],
)
def test_unknown_names_and_bad_damping(call, words, w, h):
    with pytest.raises(ValueError, match=words):
        call(w, h)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_threads(threads, w, h):
    for call in (
        lambda: mg.quantize_layer(w, h, threads=threads),
        lambda: mg.quantize(w, threads=threads),
        lambda: mg.quantize(w).dequantize(threads=threads),
        lambda: mg.round_activations(w, "nvfp4", threads=threads),
        lambda: mg.Hadamard(16).apply(w, threads=threads),
        lambda: mg.Hessian(COLS).update(w, threads=threads),
        lambda: mg.Hessian(COLS).merge(mg.Hessian(COLS), threads=threads),
        lambda: mg.make_factor(h, "gptq", threads=threads),
        lambda: mg.quantize_layer(w, h, "best", threads=threads),
        lambda: mg.shared_tensor_scale([w], mg.Recipe(), threads=threads),
        lambda: mg.alternating_tensor_scale([w], threads=threads),
    ):
        with pytest.raises(ValueError, match=f"threads is {threads!r}; it must be None or an integer from 1 on"):
            call()


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), 1e39, 1e-50])
def test_tensor_scales_that_are_no_positive_float32(scale, w, h):
    for call in (lambda: mg.quantize(w, tensor_scale=scale), lambda: mg.quantize_layer(w, h, tensor_scale=scale), lambda: mg.round_activations(w, "nvfp4", tensor_scale=scale)):
        with pytest.raises(ValueError, match=re.escape(f"tensor_scale is {scale!r}; it must be a positive finite number in float32")):
            call()


def test_tensor_scales_of_another_kind(w, h):
    for scale in ("1", True, 1j, np.ones(1)):
        with pytest.raises(TypeError, match="tensor_scale is .*; it must be a real number"):
            mg.quantize(w, tensor_scale=scale)
    with pytest.raises(ValueError, match="tensor_scale is 2.0; mxfp4 by the rule 'even' has 1"):
        mg.quantize_layer(w, h, mg.Recipe("mxfp4"), tensor_scale=2.0)
    with pytest.raises(ValueError, match="tensor_scale is 1.0; mxfp4 by the rule 'four-thirds' has 3"):
        mg.quantize(w, "mxfp4", scales="four-thirds", tensor_scale=1.0)


def test_a_call_that_goes_through_changes_nothing_either(w, h):
    before = w.tobytes(), h.tobytes()
    w.flags.writeable = h.flags.writeable = False
    for recipe in ("rtn", "gptq", "mr-gptq", "best", "best-online"):
        mg.quantize_layer(w, h, recipe, format="mxfp4")
    mg.quantize_layer(w, h, CROSSED, cross=h), mg.alternating_tensor_scale([w, w]), mg.quantize_layer(w, h, mg.Recipe(tensor_scale="alternating", scales="hessian_block"))
    mg.Hadamard(16).apply(w), mg.Hadamard(16).apply_hessian(h), mg.round_activations(w, "nvfp4"), mg.make_factor(h, "mr-gptq")
    assert (w.tobytes(), h.tobytes()) == before


@pytest.mark.parametrize(("array", "words"), [(np.ones((2, 4)), "expected an array of float32, got float64"), (np.ones(4, dtype=np.float32), "expected a matrix, got an array of rank 1"), (np.ones((2, 4), dtype=np.float32)[:, ::2], "expected adjacent columns")])
def test_the_core_converts_nothing(array, words):
    """What passes Python's door by mistake: a conversion would hide it."""
    with pytest.raises(ValueError, match=words):
        _core.first_nonfinite(array, 1)
