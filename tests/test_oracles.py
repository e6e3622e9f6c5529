"""Bytes and values against the libraries that will read them: compressed-tensors' compressor and fake quantisation, torchao's to_mx."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import fake_quantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp, generate_gparam
from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode, to_mx

import mrgptq as mg

FORMATS = ("nvfp4", "mxfp4")
TORCHAO_MODES = {"even": ScaleCalculationMode.EVEN, "floor": ScaleCalculationMode.FLOOR, "ceil": ScaleCalculationMode.RCEIL}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def million_numbers():
    """10^6 numbers whose rows spread over 2^28, more than E4M3 does: NVFP4 scales from 448 down to those that vanish."""
    rng = np.random.default_rng(1)
    return (rng.standard_normal((1000, 1024)) * np.exp2(rng.uniform(-24, 4, (1000, 1)))).astype(np.float32)


def signed_choice(rng, values, shape):
    return rng.choice(values, shape) * rng.choice([-1, 1], shape)


def ties():
    """Groups of exact ties: their largest is 6 * 2^-j, and amax 10.5 makes the global scale 2688 / 10.5 = 256, so NVFP4 steps are powers of two as well."""
    rng = np.random.default_rng(3)
    w = signed_choice(rng, [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6], (256, 128))
    w[:, ::16] = 6
    w *= np.exp2(-rng.integers(0, 12, (256, 4))).repeat(32, axis=1)
    w[0, 0] = 10.5
    return w.astype(np.float32)


def edges_of_mx_rules():
    """Group maxima at the mantissas where floor, even and ceil part, of every magnitude, and groups of zeros."""
    rng = np.random.default_rng(2)
    edges = np.float32([1, 1.5, 1.75])
    largest = rng.choice(np.concatenate([edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(2)), [0]]), (256, 4)) * np.exp2(rng.integers(-100, 100, (256, 4)))
    w = rng.uniform(-1, 1, (256, 4, 32)) * largest[..., None]
    w[:, :, 5] = largest
    return w.reshape(256, 128).astype(np.float32)


@pytest.fixture(scope="module", params=["leaf", "a million numbers", "hard numbers"])
def matrices(request):
    """Lists of float32 matrices."""
    if request.param == "leaf":
        return list(request.getfixturevalue("leaf").weights.values())
    return [million_numbers()] if request.param == "a million numbers" else [ties(), edges_of_mx_rules()]


def compressed(w, format):
    """What compressed-tensors stores for a weight, its scheme and its global scale (None for MXFP4)."""
    scheme = preset_name_to_scheme(format.upper() + "A16", ["Linear"])
    t = torch.from_numpy(w.copy())
    groups = t.unflatten(-1, (-1, scheme.weights.group_size))
    state = {"weight": t}
    if format == "nvfp4":
        state["weight_global_scale"] = generate_gparam(t.min(), t.max())
    global_scale = state.get("weight_global_scale")
    state["weight_scale"], _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights, global_scale=global_scale)
    return compressor(format).compress(state, scheme), scheme, global_scale


def compressor(format):
    return BaseCompressor.get_value_from_registry(f"{format}-pack-quantized")


def by_value(packed):
    """Codes with one zero: the libraries pack small negatives as -0, we do not."""
    codes = mg.unpack(packed.view(torch.uint8).numpy())
    return np.where(codes == 8, 0, codes)


def divisor(global_scale):
    return None if global_scale is None else float(global_scale)


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_are_those_of_compressed_tensors(format, matrices):
    for w in matrices:
        stored, scheme, global_scale = compressed(w, format)
        q = mg.quantize(w, format, tensor_scale=divisor(global_scale))
        assert np.array_equal(q.scales, stored["weight_scale"].view(torch.uint8).numpy())
        assert np.array_equal(mg.unpack(q.codes), by_value(stored["weight_packed"]))
        # It always decompresses to bfloat16.
        values = compressor(format).decompress(dict(stored), scheme)["weight"]
        assert values.dtype == torch.bfloat16
        assert torch.equal(torch.from_numpy(q.dequantize()).to(torch.bfloat16), values)


def test_tensor_scale_is_the_global_scale_of_compressed_tensors_to_rounding(matrices):
    for w in matrices:
        t = torch.from_numpy(w.copy())
        theirs, ours = float(generate_gparam(t.min(), t.max())), mg.quantize(w, "nvfp4").tensor_scale
        # 2688 * (1 / amax) is rounded twice and 2688 / amax once, each time by 2^-24 relative at most.
        assert abs(ours - theirs) <= 3.001 * 2.0**-24 * theirs


@pytest.mark.parametrize("rule", TORCHAO_MODES)
def test_bytes_are_those_of_torchao(rule, matrices):
    for w in matrices:
        scales, codes = to_mx(torch.from_numpy(w.copy()), torch.float4_e2m1fn_x2, 32, TORCHAO_MODES[rule])
        q = mg.quantize(w, "mxfp4", scales=rule)
        decided = np.ones(q.scales.shape, dtype=bool)
        if rule == "ceil":
            # torchao takes ceil(log2(amax / 6)) with log2 in float32, where numbers up to 2^7 are 2^-17 apart: just above a power of two the excess is lost and its scale clips.
            mantissa = 2 * np.frexp(np.abs(w).reshape(*q.scales.shape, 32).max(-1))[0]
            decided = ~((mantissa > 1.5) & (mantissa < 1.5 * (1 + 2.0**-16)))
            assert decided.mean() > 0.8
        assert np.array_equal(q.scales[decided], scales.view(torch.uint8).numpy()[decided])
        ours, theirs = (c.reshape(*decided.shape, 32)[decided] for c in (mg.unpack(q.codes), by_value(codes)))
        assert np.array_equal(ours, theirs)


def assert_rounds_like_compressed_tensors(x, format, global_scale, rule="absmax"):
    """x: a float32 or bfloat16 tensor of any rank."""
    arguments = preset_name_to_scheme(format.upper(), ["Linear"]).input_activations
    scales, zero_points = compute_dynamic_scales_and_zp(x, arguments, None, global_scale=global_scale)
    expected = fake_quantize(x, scales, zero_points, arguments, global_scale=global_scale)
    assert expected.dtype == x.dtype
    if x.dtype == torch.bfloat16:
        rounded = mg.round_activations(x.view(torch.int16).numpy().view(np.uint16), format, rule=rule, dtype="bfloat16", tensor_scale=divisor(global_scale))
    else:
        rounded = mg.round_activations(x.numpy(), format, rule=rule, tensor_scale=divisor(global_scale))
    assert torch.equal(torch.from_numpy(rounded).to(x.dtype), expected)  # -0 equals 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_activations_round_like_compressed_tensors(format, dtype, matrices):
    for w in matrices:
        x = torch.from_numpy(w.copy()).to(DTYPES[dtype])
        # As calibrated, and as it is for an input four times larger or smaller than any seen in calibration.
        for factor in (1.0, 4.0, 0.25):
            assert_rounds_like_compressed_tensors(x, format, generate_gparam(x.min(), x.max()) * factor if format == "nvfp4" else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_inputs_of_leaf_round_like_compressed_tensors(format, dtype, leaf):
    for name in ("layers.0.self_attn.q_proj", "layers.3.mlp.down_proj"):
        x = torch.from_numpy(leaf.inputs[name].copy()).to(DTYPES[dtype]).unflatten(0, (4, -1))
        assert_rounds_like_compressed_tensors(x, format, generate_gparam(x.min(), x.max()) if format == "nvfp4" else None)


def test_the_bfloat16_rule_is_another_than_the_float32_rule():
    """Else the tests above could not tell whether it is there."""
    x = torch.from_numpy(million_numbers()).to(torch.bfloat16)
    bits, wide = x.view(torch.int16).numpy().view(np.uint16), x.to(torch.float32).numpy()
    differing = (mg.round_activations(bits, "nvfp4", dtype="bfloat16") != mg.round_activations(wide, "nvfp4")).reshape(-1, 16).any(axis=1)
    assert 0.001 < differing.mean() < 0.1
    assert np.array_equal(mg.round_activations(bits, "mxfp4", dtype="bfloat16"), mg.round_activations(wide, "mxfp4"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_by_even_round_like_compressed_tensors_and_by_others_do_not(dtype, leaf):
    x = torch.from_numpy(leaf.inputs["layers.3.mlp.down_proj"][:512].copy()).to(DTYPES[dtype])
    assert_rounds_like_compressed_tensors(x, "mxfp4", None, rule="even")
    for rule in ("floor", "ceil", "mse", "quest"):
        with pytest.raises(AssertionError):
            assert_rounds_like_compressed_tensors(x, "mxfp4", None, rule=rule)
    for rule in ("mse", "four_over_six"):
        with pytest.raises(AssertionError):
            assert_rounds_like_compressed_tensors(x, "nvfp4", generate_gparam(x.min(), x.max()), rule=rule)


@pytest.mark.parametrize("rule", TORCHAO_MODES)
@pytest.mark.parametrize("name", ["leaf", "ties", "edges"])
def test_activations_round_like_torchao(rule, name, leaf):
    x = leaf.inputs["layers.2.mlp.down_proj"][:512].copy() if name == "leaf" else ties() if name == "ties" else edges_of_mx_rules()
    theirs = MXTensor.to_mx(torch.from_numpy(x), torch.float4_e2m1fn_x2, 32, TORCHAO_MODES[rule]).dequantize(torch.float32).numpy()
    ours = mg.round_activations(x, "mxfp4", rule=rule)
    decided = np.ones((len(x), x.shape[1] // 32), dtype=bool)
    if rule == "ceil":  # as above: torchao's logarithm loses a little excess
        mantissa = 2 * np.frexp(np.abs(x).reshape(*decided.shape, 32).max(-1))[0]
        decided = ~((mantissa > 1.5) & (mantissa < 1.5 * (1 + 2.0**-16)))
        assert decided.mean() > 0.8
    assert np.array_equal(ours.reshape(*decided.shape, 32)[decided], theirs.reshape(*decided.shape, 32)[decided])
