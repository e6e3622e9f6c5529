"""Layers of every shape that checkpoints have: columns that no group divides, one row, one column, nothing but zeros, rotations that do not fit, biases, tied embeddings."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from test_loaders import run_card

import mrgptq as mg
from mrgptq import cli, hf
from mrgptq.jobs import quantize_checkpoint
from mrgptq.plan import make_plan

RECIPES = {
    "rtn": mg.Recipe.named("rtn"),
    "mr-gptq": mg.Recipe.named("mr-gptq"),
    "mr-gptq W4A4": mg.Recipe.named("mr-gptq", activations="nvfp4"),
    "best": mg.Recipe.named("best", "mxfp4"),
    "best-online W4A4": mg.Recipe.named("best-online", "mxfp4", activations="mxfp4"),
}
GROUP = {"nvfp4": 16, "mxfp4": 32}


def layer(rows, cols, seed=0, tokens=200):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, cols)).astype(np.float32), rng.standard_normal((tokens, cols)).astype(np.float32)


def hessian_of(x):
    h = mg.Hessian(x.shape[1])
    h.update(x)
    return h


# ---- One layer


@pytest.mark.parametrize("format", GROUP)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (7, 1), (1, 40), (5, 100), (3, 31)])
@pytest.mark.parametrize("name", ["rtn", "mr-gptq", "best"])
def test_a_padded_layer_is_the_layer_with_zeros_behind_it(name, rows, cols, format):
    """By hand: weight, inputs, cross and stream moments get columns of zeros, and all is as without padding."""
    w, x = layer(rows, cols)
    recipe = replace(mg.Recipe.named(name, format), pad=True)
    padding = -cols % GROUP[format]
    wide_w, wide_x = (np.pad(a, ((0, 0), (0, padding))) for a in (w, x))
    more, wide_more = {}, {}
    if recipe.cross:
        apart = x + 0.1 * layer(1, cols, 5)[1]
        more = {"cross": apart.T @ x / len(x), "stream": np.ones((rows, cols), np.float32)}
        wide_more = {"cross": np.pad(more["cross"], (0, padding)), "stream": np.pad(more["stream"], ((0, 0), (0, padding)))}
    got, expected = mg.quantize_layer(w, hessian_of(x), recipe, **more), mg.quantize_layer(wide_w, hessian_of(wide_x), replace(recipe, pad=False), **wide_more)
    np.testing.assert_array_equal(got.codes, expected.codes)
    np.testing.assert_array_equal(got.scales, expected.scales)
    assert (got.shape, got.padding, got.report.padding, got.report.cols, got.tensor_scale, got.report.tokens) == ((rows, cols), padding, padding, cols, expected.tensor_scale, 200)
    np.testing.assert_array_equal(got.dequantize(unrotate=True), expected.dequantize(unrotate=True)[:, :cols])
    np.testing.assert_array_equal(got.dequantize(), expected.dequantize() if recipe.rotation else expected.dequantize()[:, :cols])
    assert got.report.relative_error == expected.report.relative_error
    shared = mg.make_factor(hessian_of(x), recipe) if recipe.solver == "gptq" else None
    again = mg.quantize_layer(w, np.asarray(hessian_of(x)), recipe, factor=shared, **more, tensor_scale=mg.shared_tensor_scale([w], recipe))
    np.testing.assert_array_equal(again.codes, got.codes)


@pytest.mark.parametrize("prepacked", [False, True])
@pytest.mark.parametrize("rotation", [None, 16])
@pytest.mark.parametrize("activations", [None, "nvfp4", "int8"])
def test_products_with_a_padded_weight_take_inputs_as_they_are(activations, rotation, prepacked):
    w, x = layer(9, 100, tokens=5)
    q = mg.quantize_layer(w, np.eye(100), mg.Recipe(rotation=rotation, pad=True))
    wide = mg.QuantizedMatrix(q.format, q.codes, q.scales, q.tensor_scale, q.rotation)
    expected = mg.matmul(np.pad(x, ((0, 0), (0, 12))), wide, activations=activations)
    packed = mg.prepack(q) if prepacked else q
    np.testing.assert_array_equal(mg.matmul(x, packed, activations=activations), expected)
    if activations is None:
        reference = x.astype(np.float64) @ q.dequantize(unrotate=True).astype(np.float64).T
        np.testing.assert_allclose(expected, reference, rtol=1e-4, atol=1e-4)
    if prepacked:
        back = packed.unpack()
        assert back.padding == 12 and back.shape == (9, 100) and np.array_equal(back.codes, q.codes)
    with pytest.raises(ValueError, match="x has 112 columns; the weight has 100"):
        mg.matmul(np.pad(x, ((0, 0), (0, 12))), packed, activations=activations)


def test_out_of_a_padded_matrix_is_filled():
    q = mg.quantize_layer(layer(4, 20)[0], np.eye(20), replace(RECIPES["mr-gptq"], pad=True))
    out = np.empty((4, 20), np.float32)
    assert q.dequantize(out, unrotate=True) is out and np.array_equal(out, q.dequantize(unrotate=True))
    rotated = np.empty((4, 32), np.float32)
    assert q.dequantize(rotated) is rotated and np.array_equal(rotated, q.dequantize())
    with pytest.raises(ValueError, match=r"out is float32 of shape \(4, 32\); it must be a float32 array of shape \(4, 20\)"):
        q.dequantize(rotated, unrotate=True)


@pytest.mark.parametrize("padding", [-1, 16, 32])
def test_padding_is_less_than_a_group(padding):
    q = mg.quantize_layer(layer(4, 32)[0], None, "rtn")
    with pytest.raises(ValueError, match=f"padding is {padding}; of 32 columns in groups of 16 fewer than a group can be added"):
        mg.QuantizedMatrix(q.format, q.codes, q.scales, q.tensor_scale, padding=padding)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_zeros_and_single_rows_are_zeros_and_single_rows(recipe):
    """A weight of zeros, rows of zeros among others, one row: no scale that is not finite, no value where there was none."""
    w, x = layer(6, 64)
    h = hessian_of(x)
    w[2] = 0
    got = mg.quantize_layer(w, h, recipe)
    assert not got.dequantize(unrotate=True)[2].any() and np.isfinite(got.dequantize()).all() and got.report.fallback is None
    zero = mg.quantize_layer(np.zeros_like(w), h, recipe)
    assert not zero.dequantize().any() and np.isfinite(zero.tensor_scale) and zero.report.weight_error is None and zero.report.relative_error is None
    alone = mg.quantize_layer(w[:1], h, recipe)
    assert alone.shape == (1, 64) and 0 < alone.report.relative_error < 0.05


@pytest.mark.parametrize(("cols", "asked", "taken"), [(96, 128, 32), (48, 32, 16), (64, 32, 32), (192, 1024, 64), (64, 1 << 20, 64)])
def test_a_rotation_that_does_not_fit_is_the_largest_that_does(cols, asked, taken):
    w, x = layer(8, cols)
    recipe = replace(RECIPES["mr-gptq"], rotation=asked)
    got, expected = mg.quantize_layer(w, hessian_of(x), recipe), mg.quantize_layer(w, hessian_of(x), replace(recipe, rotation=taken))
    assert got.rotation == mg.Hadamard(taken) and got.report.rotation == taken
    np.testing.assert_array_equal(got.codes, expected.codes)
    np.testing.assert_array_equal(got.scales, expected.scales)


# ---- Models


def odd_llama(folder, leaf_folder, **more):
    """hidden_size 64, intermediate_size 104: down_proj has columns that neither 16 nor 32 divides."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 104, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2} | more)).save_pretrained(folder)
    for path in leaf_folder.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def inspected(folder, capsys, column):
    """A column of what `mrgptq inspect` prints of each layer."""
    assert cli.main(["inspect", str(folder)]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    header = next(words for words in table if words[:2] == ["layer", "method"])
    return {words[0]: words[header.index(column)] for words in table if len(words) > 2 and words[1] in ("gptq", "rounding")}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_a_model_with_odd_columns_is_padded_where_the_dialect_stores_that(recipe, tmp_path, leaf_folder, calibration_text, capsys):
    """Packed layers answer as dequantised ones, the report tells, and no loader but ours is promised."""
    model = odd_llama(tmp_path / "model", leaf_folder)
    with pytest.raises(ValueError, match=r"down_proj.weight has 104 columns; (nvfp4 needs a multiple of 16|mxfp4 needs a multiple of 32), or zeros behind them: pad=True, --pad"):
        make_plan(model, tmp_path / "out", recipe, dialect="mrgptq")
    with pytest.raises(ValueError, match=r"down_proj has (8|24) columns of zeros behind its own; compressed-tensors cannot say so"):
        make_plan(model, tmp_path / "out", replace(recipe, pad=True, activation_rule="absmax"))
    made = make_plan(model, tmp_path / "out", replace(recipe, pad=True), dialect="mrgptq", tokens=512, sequence=64)
    assert "2 layers with columns of zeros added" in repr(made)
    reports = quantize_checkpoint(made, calibration_text, threads=2)
    padding = -104 % GROUP[recipe.format]
    assert {name.rsplit(".", 1)[1]: report.padding for name, report in reports.items() if report.padding} == {"down_proj": padding}
    assert inspected(tmp_path / "out", capsys, "padding") == {name: str(report.padding) for name, report in reports.items()}
    back = mg.load(tmp_path / "out")
    assert back["model.layers.0.mlp.down_proj.weight"].shape == (64, 104) and "weight_shape" not in " ".join(back)
    ids = torch.arange(48).reshape(2, 24)
    with torch.no_grad():
        packed, plain = (hf.load_quantized(tmp_path / "out", kernels=kernels)(input_ids=ids).logits for kernels in (True, False))
    torch.testing.assert_close(packed, plain, rtol=0.05 if recipe.activations else 1e-3, atol=0.02 if recipe.activations else 1e-4)  # rounded inputs part where they lie near a tie
    x, layer = torch.randn(5, 104, generator=torch.Generator().manual_seed(0)), "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        alone, dense = (hf.load_quantized(tmp_path / "out", kernels=kernels).get_submodule(layer)(x) for kernels in (True, False))
    torch.testing.assert_close(alone, dense, rtol=1e-5, atol=1e-5)
    assert recipe.activations is None or reports[layer].rotation is None  # or the share of the added columns would be lost
    state = hf.load_quantized(tmp_path / "out").state_dict()
    again = hf.load_quantized(tmp_path / "out")
    again.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, packed)


@pytest.mark.parametrize("dialect", ["compressed-tensors", "mrgptq"])
def test_rotations_of_several_sizes_are_stored_and_run(dialect, tmp_path, leaf_folder, calibration_text, capsys):
    """By the library's own transforms in compressed-tensors, and by ours; fp_quant refuses them by name."""
    model = odd_llama(tmp_path / "model", leaf_folder, intermediate_size=96, tie_word_embeddings=True)
    recipe = replace(mg.Recipe.named("mr-gptq"), rotation=64)
    made = make_plan(model, tmp_path / "out", recipe, dialect=dialect, tokens=512, sequence=64)
    assert "Hadamard 64; 2 layers by Hadamard 32" in repr(made)
    reports = quantize_checkpoint(made, calibration_text, threads=2)
    assert {report.rotation for name, report in reports.items() if "down_proj" in name} == {32} and {report.rotation for name, report in reports.items() if "down_proj" not in name} == {64}
    back = {name: value for name, value in mg.load(tmp_path / "out").items() if isinstance(value, mg.QuantizedMatrix)}
    assert inspected(tmp_path / "out", capsys, "Hadamard") == {name: str(report.rotation) for name, report in reports.items()}
    assert {name: value.rotation.block_size for name, value in back.items()} == {f"{name}.weight": report.rotation for name, report in reports.items()}
    mg.save(tmp_path / "again", mg.load(tmp_path / "out"), dialect, config=json.loads((tmp_path / "out" / "config.json").read_text()))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()
    if dialect == "compressed-tensors":  # the same said by a regular expression, as other writers do
        said = json.loads((tmp_path / "again" / "config.json").read_text())
        for apply in said["quantization_config"]["transform_config"]["config_groups"]["v32"]["apply"]:
            apply["targets"] = ["re:.*down_proj$"]
        (tmp_path / "again" / "config.json").write_text(json.dumps(said))
        assert {name: value.rotation for name, value in mg.load(tmp_path / "again").items() if name in back} == {name: value.rotation for name, value in back.items()}
    ids = torch.arange(48).reshape(2, 24)
    with torch.no_grad():
        ours = hf.load_quantized(tmp_path / "out", kernels=False)(input_ids=ids).logits
        if dialect == "compressed-tensors":
            dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
            for name, value in back.items():
                dense.get_parameter(name).copy_(torch.from_numpy(value.dequantize(unrotate=True)))
            torch.testing.assert_close(run_card(tmp_path / "out")(input_ids=ids).logits.float(), dense(input_ids=ids).logits, rtol=0.05, atol=0.02)  # bfloat16
            torch.testing.assert_close(ours, dense(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"down_proj has columns that a rotation of block size 64 does not divide, 32 does; fp_quant stores one block size for all layers: ask for rotation 32"):
        make_plan(model, tmp_path / "other", replace(recipe, format="mxfp4", activations="mxfp4", scales="four-thirds", mx_rule="four-thirds"), dialect="fp_quant")


def test_a_rotation_larger_than_every_layer_is_the_largest_that_one_takes(tmp_path, leaf_folder):
    made = make_plan(leaf_folder, tmp_path / "out", replace(mg.Recipe.named("rtn"), rotation=512))
    assert made.recipe.rotation == 128 and "Hadamard 128" in repr(made) and "layers by" not in repr(made)


@pytest.mark.parametrize("recipe", ["mr-gptq W4A4", "best"])
def test_biases_and_tied_embeddings_are_kept_as_they_are(recipe, tmp_path, leaf_folder, calibration_text):
    """Qwen 2's q, k and v have biases; with tied embeddings there is no lm_head in the file and none in the result."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "model")
    for path in leaf_folder.glob("tokenizer*"):
        (tmp_path / "model" / path.name).write_bytes(path.read_bytes())
    quantize_checkpoint(make_plan(tmp_path / "model", tmp_path / "out", RECIPES[recipe], tokens=512, sequence=64), calibration_text, threads=2)
    before, after = mg.load(tmp_path / "model"), mg.load(tmp_path / "out")
    assert before.keys() == after.keys() and "lm_head.weight" not in after and sum(name.endswith("bias") for name in after) == 6
    for name, value in after.items():
        if not isinstance(value, mg.QuantizedMatrix):
            np.testing.assert_array_equal(np.asarray(value), np.asarray(before[name]))
    loaded = hf.load_quantized(tmp_path / "out", kernels=False)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(loaded.get_parameter(name), parameter)


@pytest.mark.parametrize("recipe", ["rtn", "mr-gptq", "best"])
def test_a_dead_layer_is_exported_with_finite_scales(recipe, tmp_path, leaf_folder, calibration_text):
    """down_proj of zeros: what it feeds stays as it was, nothing becomes infinite."""
    model = odd_llama(tmp_path / "model", leaf_folder, intermediate_size=96)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        loaded.model.layers[0].mlp.down_proj.weight.zero_()
        loaded.model.layers[1].self_attn.q_proj.weight[3] = 0
    loaded.save_pretrained(model)
    reports = quantize_checkpoint(make_plan(model, tmp_path / "out", RECIPES[recipe], tokens=512, sequence=64), calibration_text, threads=2)
    for name, value in mg.load(tmp_path / "out").items():
        if isinstance(value, mg.QuantizedMatrix):
            assert np.isfinite(value.tensor_scale) and np.isfinite(value.dequantize()).all()
    assert not mg.load(tmp_path / "out")["model.layers.0.mlp.down_proj.weight"].dequantize().any()
    assert reports["model.layers.0.mlp.down_proj"].relative_error is None
