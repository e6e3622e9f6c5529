"""The NVFP4 divisor fitted in turn with the group scales (``alternating``)."""

import re

import numpy as np
import pytest

import mrgptq as mg
from mrgptq import reference
from mrgptq.jobs import quantize_checkpoint
from mrgptq.plan import make_plan
from scales_by_hand import AWKWARD, squares


def layer_weights(seed, rows=48, cols=96):
    """Rows of unlike size and heavy tails, as weights have: there the divisor matters."""
    rng = np.random.default_rng(seed)
    return (rng.standard_t(5, (rows, cols)) * np.exp(rng.normal(0, 0.7, (rows, 1)))).astype(np.float32)


def total_error(weights, divisor, scales):
    """Σ (w - ŵ)² in float64 under one divisor."""
    return sum(float(squares(w, mg.quantize(w, "nvfp4", scales=scales, tensor_scale=divisor).dequantize()).sum()) for w in weights)


ONE_ULP = 2.0**-23  # a divisor is rounded to float32; sums in another order may push it over one border


@pytest.mark.parametrize("scales", ["absmax", "mse", "four_over_six", "fpquant_mse"])
def test_the_alternating_divisor_loses_no_more_and_is_that_of_the_reference(scales, leaf):
    cases = [[layer_weights(seed)] for seed in range(6)] + [[leaf.weights["layers.0.self_attn.k_proj"]]]
    gained = 0
    for weights in cases:
        divisor, plain = mg.alternating_tensor_scale(weights, scales), mg.quantize(weights[0], "nvfp4").tensor_scale
        assert divisor == np.float32(divisor)
        before, after = total_error(weights, plain, scales), total_error(weights, divisor, scales)
        assert after < before if divisor != plain else after == before
        gained += divisor != plain
        assert abs(divisor / float(reference.alternating_tensor_scale(weights, scales)) - 1) <= ONE_ULP
    assert gained >= 2


def test_the_alternating_divisor_takes_up_the_factor_of_least_squares():
    w = layer_weights(7)
    plain = mg.quantize(w, "nvfp4", scales="mse")
    assert mg.alternating_tensor_scale([w], iterations=0) == plain.tensor_scale
    factor = np.linalg.lstsq(plain.dequantize().astype(np.float64).reshape(-1, 1), w.astype(np.float64).reshape(-1), rcond=None)[0][0]  # w ≈ factor * ŵ: a divisor smaller by it
    once = mg.alternating_tensor_scale([w], iterations=1)
    assert abs(factor - 1) > 1e-4 and abs(once * factor / plain.tensor_scale - 1) <= ONE_ULP
    errors = [total_error([w], mg.alternating_tensor_scale([w], iterations=n), "mse") for n in range(5)]
    assert all(b <= a for a, b in zip(errors, errors[1:], strict=False)) and errors[1] < errors[0]


def test_a_divisor_for_several_matrices_is_that_of_their_rows_together():
    weights = [layer_weights(seed, rows) for seed, rows in ((8, 16), (9, 40), (10, 8))]
    together = mg.alternating_tensor_scale([np.concatenate(weights)])
    assert abs(mg.alternating_tensor_scale(weights) / together - 1) <= ONE_ULP
    assert abs(float(reference.alternating_tensor_scale(weights)) / together - 1) <= ONE_ULP
    assert abs(mg.alternating_tensor_scale(weights[:1]) / together - 1) > 1e-3


@pytest.mark.parametrize("name", AWKWARD)
def test_an_alternating_divisor_is_usable_on_awkward_matrices(name):
    w = AWKWARD[name]
    divisor = mg.alternating_tensor_scale([w])
    q = mg.quantize(w, "nvfp4", scales="mse", tensor_scale=divisor)
    assert np.isfinite(q.dequantize()).all()
    assert total_error([w], divisor, "mse") <= total_error([w], mg.quantize(w, "nvfp4").tensor_scale, "mse")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mg.alternating_tensor_scale([]), "weights is empty; at least one matrix is needed"),
        (lambda: mg.alternating_tensor_scale([np.ones((2, 24))]), "weights has 24 columns; nvfp4 needs a multiple of 16"),
        (lambda: mg.alternating_tensor_scale([np.ones((2, 16))], "quest"), "unknown scales for nvfp4 'quest'"),
        (lambda: mg.alternating_tensor_scale([np.full((2, 16), np.nan)]), "weights is nan at row 0, column 0"),
        (lambda: mg.Recipe("mxfp4", tensor_scale="alternating"), "unknown tensor_scale for mxfp4 'alternating'"),
    ],
)
def test_a_divisor_that_cannot_be_fitted_is_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(("scales", "by"), [("mse", "mse"), ("four_over_six", "four_over_six"), ("absmax", "absmax"), ("hessian", "mse"), ("gptq", "mse")])
@pytest.mark.parametrize("rotation", [None, 16])
def test_a_recipe_fits_the_divisor_in_its_own_basis(scales, by, rotation, leaf):
    name = "layers.1.self_attn.q_proj"
    family = [leaf.weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
    recipe = mg.Recipe("nvfp4", rotation=rotation, scales=scales, order="group", tensor_scale="alternating")
    rotated = [w if rotation is None else mg.Hadamard(rotation).apply(w) for w in family]
    own = mg.quantize_layer(family[0], leaf.hessians[name], recipe)
    assert own.tensor_scale == mg.alternating_tensor_scale(rotated[:1], by)
    shared = mg.shared_tensor_scale(family, recipe)
    assert shared == mg.alternating_tensor_scale(rotated, by) != mg.nvfp4_tensor_scale(max(np.abs(w).max() for w in rotated))
    layers = [mg.quantize_layer(w, leaf.hessians[name], recipe, tensor_scale=shared) for w in family]
    assert [q.tensor_scale for q in layers] == [shared] * 3


def test_a_checkpoint_by_an_alternating_divisor_has_one_for_each_family(leaf, leaf_folder, tmp_path):
    recipe = mg.Recipe("nvfp4", scales="mse", solver="rtn", order="natural", tensor_scale="alternating")
    quantize_checkpoint(make_plan(leaf_folder, tmp_path / "out", recipe))
    loaded = mg.load(tmp_path / "out")
    for block in range(4):
        for family in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"), ("self_attn.o_proj",), ("mlp.down_proj",)):
            expected = mg.shared_tensor_scale([leaf.weights[f"layers.{block}.{part}"] for part in family], recipe)
            assert {loaded[f"model.layers.{block}.{part}.weight"].tensor_scale for part in family} == {expected}
