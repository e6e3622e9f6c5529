"""A layer's inputs as codes and scales: the values of round_activations, which other tests hold against stock kernels, in the layouts that readers expect."""

import ml_dtypes
import numpy as np
import pytest
import torch
from torchao.prototype.mx_formats.utils import from_blocked, to_blocked

import mrgptq as mg
from mrgptq import reference

RULES = {"nvfp4": ("absmax", "fpquant_mse", "mse", "four_over_six"), "mxfp4": ("absmax", "floor", "ceil", "even", "four-thirds", "fpquant_mse", "mse", "quest")}
CASES = [(format, rule) for format, rules in RULES.items() for rule in rules]


def inputs(*shape, seed=0):
    """Heavy tails, and tokens of very different size."""
    rng = np.random.default_rng(seed)
    return (rng.standard_t(3, shape) * np.exp2(rng.integers(-6, 7, (*shape[:-1], 1)))).astype(np.float32)


@pytest.mark.parametrize("rotation", [None, 16, 32, 64, 128])
@pytest.mark.parametrize(("format", "rule"), CASES)
def test_the_values_are_those_of_round_activations(format, rule, rotation):
    x, turn = inputs(3, 7, 256), None if rotation is None else mg.Hadamard(rotation)
    for array, keywords in ((x, {}), (x.astype(ml_dtypes.bfloat16), {}), (x.astype(ml_dtypes.bfloat16).view(np.uint16), {"dtype": "bfloat16"}), (x.transpose(1, 0, 2), {})):
        q = mg.quantize_activations(array, format, rule=rule, rotation=turn, **keywords)
        values = mg.round_activations(array, format, rule=rule, rotation=turn, **keywords)
        assert q.shape == (21, 256) and np.array_equal(q.dequantize(), values.reshape(21, 256))
        assert q.rotation == (turn or mg.Identity()) and q.report is None
        for threads in (1, 2, 3):
            again = mg.quantize_activations(array, format, rule=rule, rotation=turn, threads=threads, **keywords)
            assert again.codes.tobytes() == q.codes.tobytes() and again.scales.tobytes() == q.scales.tobytes()


@pytest.mark.parametrize(("format", "rule"), CASES)
def test_codes_and_scales_are_the_definitions(format, rule):
    """reference.py's codes under the scales found, and for a rule of MX_RULES or NVFP4's absmax its scales."""
    x = inputs(24, 96)
    q = mg.quantize_activations(x, format, rule=rule)
    steps = np.repeat(reference.steps_of(q.scales, format, np.float32(q.tensor_scale)), reference.GROUP_SIZE[format], axis=1)
    assert np.array_equal(mg.unpack(q.codes), reference.encode_e2m1(x / steps))
    if rule in ("absmax", *mg.MX_RULES):
        assert np.array_equal(q.scales, reference.find_scales(x, format, mx_rule="even" if rule == "absmax" else rule))


def test_a_calibrated_tensor_scale_is_kept():
    x = inputs(24, 96)
    q = mg.quantize_activations(x, "nvfp4", tensor_scale=77.7)
    assert q.tensor_scale == np.float32(77.7)
    assert np.array_equal(q.dequantize(), mg.round_activations(x, "nvfp4", tensor_scale=77.7))


@pytest.mark.parametrize("rotation", [None, 32])
def test_quest_brings_its_clip_mask(rotation):
    x, turn = inputs(24, 96), None if rotation is None else mg.Hadamard(rotation)
    q = mg.quantize_activations(x.reshape(4, 6, 96), "mxfp4", rule="quest", rotation=turn)
    steps = np.repeat(np.ldexp(np.float32(1), q.scales.astype(int) - 127), 32, axis=1)
    inside = np.abs(reference.rotate(x, rotation)) < 6 * steps
    assert np.array_equal(q.clip_mask, inside) and not inside.all() and inside.mean() > 0.9
    assert mg.quantize_activations(x, "mxfp4").clip_mask is None


def test_turning_back_gives_the_inputs_but_for_the_grid():
    x, rotation = inputs(24, 96), mg.Hadamard(32)
    q = mg.quantize_activations(x, "mxfp4", rotation=rotation)
    error = np.linalg.norm(q.dequantize(unrotate=True) - x, axis=1)
    # Half a step, at most a third of the value, above step / 4, below it the value itself: no more than the group's norm, whatever it holds.
    assert (error <= np.linalg.norm(x, axis=1) / 3).all()


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda x: mg.quantize_activations(x[:, :40], "mxfp4"), ValueError, "x has 40 columns; mxfp4 needs a multiple of 32"),
        (lambda x: mg.quantize_activations(x, "fp8"), ValueError, "unknown format 'fp8'; known: mxfp4, nvfp4"),
        (lambda x: mg.quantize_activations(x, "nvfp4", rule="even"), ValueError, "unknown rule for nvfp4 'even'"),
        (lambda x: mg.quantize_activations(x, "mxfp4", rotation=mg.Hadamard(64)), ValueError, "x has 96 columns; a rotation of block size 64 needs a multiple of it"),
        (lambda x: mg.quantize_activations(x, "mxfp4", rotation=32), TypeError, "rotation is 32; it must be None or a rotation"),
        (lambda x: mg.quantize_activations(np.where(x == x[5, 7], np.nan, x), "nvfp4"), ValueError, "x is nan at row 5, column 7; every value must be finite"),
        (lambda x: mg.quantize_activations(np.where(x == x[5, 7], np.inf, x).reshape(4, 6, 96), "mxfp4"), ValueError, r"x is inf at index \(0, 5, 7\)"),
        (lambda x: mg.quantize_activations(x.astype(int), "nvfp4"), TypeError, "x has dtype int64; allowed: float32"),
        (lambda x: mg.quantize_activations(x, "nvfp4", tensor_scale=-1), ValueError, "tensor_scale is -1; it must be a positive finite number"),
    ],
)
def test_refusals(call, kind, message):
    with pytest.raises(kind, match=message):
        call(inputs(24, 96))


@pytest.mark.parametrize("k", [1, 3, 16, 24, 32, 48, 96, 100, 128, 192])
@pytest.mark.parametrize(("format", "rule"), [("nvfp4", "absmax"), ("nvfp4", "mse"), ("mxfp4", "even"), ("mxfp4", "quest")])
def test_any_matrix_turns_in_the_same_pass(format, rule, k):
    """The bytes of turning first, which test_rotations holds against the definition; 38400 columns are more than one piece for every k."""
    block = np.random.default_rng(k).standard_normal((k, k)).astype(np.float32)
    x, rotation = inputs(3, 38400), mg.Dense(block)
    turned = reference.multiply_blocks(x, block)
    two, one = mg.quantize_activations(turned, format, rule=rule), mg.quantize_activations(x, format, rule=rule, rotation=rotation)
    assert np.array_equal(one.codes, two.codes) and np.array_equal(one.scales, two.scales) and one.tensor_scale == two.tensor_scale and one.rotation == rotation
    assert np.array_equal(mg.round_activations(x, format, rule=rule, rotation=rotation), two.dequantize())
    assert np.array_equal(mg.quantize(x, format, scales=rule, rotation=rotation).codes, two.codes)
    if rule == "quest":
        assert np.array_equal(one.clip_mask, two.clip_mask)
    kept = x.copy()
    assert mg.round_activations(kept, format, rule=rule, rotation=rotation, out=kept) is kept and np.array_equal(kept, two.dequantize())


def test_a_bfloat16_x_that_is_turned_rounds_as_float32():
    x, rotation = inputs(2000, 96).astype(ml_dtypes.bfloat16), mg.Dense(np.eye(3, dtype=np.float32)[[1, 2, 0]])
    turned = reference.multiply_blocks(x.astype(np.float32), rotation.matrix)
    assert np.array_equal(mg.quantize_activations(x, "nvfp4", rotation=rotation).scales, mg.quantize_activations(turned, "nvfp4").scales)
    assert not np.array_equal(mg.quantize_activations(x, "nvfp4").scales, mg.quantize_activations(x.astype(np.float32), "nvfp4").scales)  # where the rules differ


def test_what_is_not_finite_or_overflows_under_a_matrix_is_named():
    x, rotation = inputs(24, 96), mg.Dense(np.diag(np.float32([1, 2, 4])))  # zeros beside the diagonal: times infinity they are no number
    for format in RULES:
        with pytest.raises(ValueError, match="x is inf at row 5, column 7"):
            mg.quantize_activations(np.where(x == x[5, 7], np.inf, x), format, tensor_scale=1.0 if format == "mxfp4" else 7.0, rotation=rotation)
        with pytest.raises(ValueError, match="row 0 overflows float32 when it is rotated by blocks of 3"):
            mg.quantize_activations(np.full_like(x, 1e38), format, rotation=rotation)


# ---- Tiles of scales


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (127, 3), (129, 5), (300, 17), (256, 8)])
def test_tiles_are_torchaos(shape):
    scales = np.random.default_rng(0).integers(1, 255, shape, dtype=np.uint8)
    blocked = mg.to_blocked(scales)
    assert np.array_equal(blocked, to_blocked(torch.from_numpy(scales)).numpy())
    assert np.array_equal(mg.from_blocked(blocked, shape), scales)
    assert np.array_equal(from_blocked(torch.from_numpy(blocked), *shape).numpy(), scales)
    rows, groups = shape
    for m, k in ((0, 0), (rows - 1, groups - 1), (rows // 2, groups // 2)):  # the offset as kernels compute it
        assert blocked[m // 128 * -(-groups // 4) * 512 + k // 4 * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4] == scales[m, k]
    assert np.count_nonzero(blocked) == scales.size  # zeros fill up


def test_tiles_of_any_array_of_bytes():
    q = mg.quantize_activations(inputs(40, 160), "nvfp4")
    assert np.array_equal(mg.from_blocked(mg.to_blocked(q.scales).reshape(-1, 16), q.scales.shape), q.scales)
    assert np.array_equal(mg.to_blocked(np.asfortranarray(q.scales)), mg.to_blocked(q.scales))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mg.to_blocked(np.zeros((2, 2), np.float32)), r"scales is float32 of shape \(2, 2\); it must be a uint8 matrix"),
        (lambda: mg.to_blocked(np.zeros(4, np.uint8)), r"scales is uint8 of shape \(4,\); it must be a uint8 matrix"),
        (lambda: mg.from_blocked(np.zeros(512, np.uint8), (129, 4)), "blocked is uint8 with 512 elements; the tiles of 129 x 4 scales are 1024 of uint8"),
        (lambda: mg.from_blocked(np.zeros(512, np.int8), (1, 1)), "blocked is int8 with 512 elements; the tiles of 1 x 1 scales are 512 of uint8"),
        (lambda: mg.from_blocked(np.zeros(512, np.uint8), (0, 4)), r"shape is \(0, 4\); it must be two integers from 1 on, \(rows, groups\)"),
        (lambda: mg.from_blocked(np.zeros(512, np.uint8), 4), r"shape is 4; it must be two integers from 1 on"),
    ],
)
def test_what_is_no_scales_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
