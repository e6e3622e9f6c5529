"""Models with experts: each expert's layers are quantised like any others, under the tokens that reach them."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from folders import contents
from moe_models import KINDS, make_moe

import mrgptq as mg
from mrgptq import hf, plan
from mrgptq.hf.beside import observe_both
from mrgptq.hf.blocks import removing
from mrgptq.hf.experts import Experts, split_experts
from mrgptq.hf.model import decoder_blocks
from mrgptq.jobs import quantize_checkpoint
from mrgptq.modules import fused_groups
from mrgptq.plan import make_plan

RECIPES = {
    "rtn": mg.Recipe.named("rtn"),
    "mr-gptq": mg.Recipe.named("mr-gptq"),
    "mr-gptq W4A4": mg.Recipe.named("mr-gptq", activations="nvfp4"),
    "best": mg.Recipe.named("best", "mxfp4"),
    "best W4A4": mg.Recipe.named("best", activations="nvfp4"),
}


@pytest.fixture(scope="module", params=KINDS)
def moe(request, tmp_path_factory, leaf_folder):
    """(folder, model as transformers made it)."""
    folder = tmp_path_factory.mktemp("moe") / request.param
    return folder, make_moe(request.param, folder, leaf_folder)


def tokens(count=4, sequence=32, seed=1):
    return torch.randint(0, 1024, (count, sequence), generator=torch.Generator().manual_seed(seed))


def test_a_model_taken_apart_answers_as_transformers_has_it(moe):
    """In sums of another order; its names are the checkpoint's, and its experts share the fused tensors' memory."""
    folder, model = moe
    loaded = hf.load_model(folder)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=tokens()).logits, model(input_ids=tokens()).logits, rtol=1e-5, atol=1e-5)
    assert any(isinstance(module, Experts) for module in loaded.modules())
    assert {name for name, _ in loaded.named_parameters()} <= set(mg.load(folder))
    for module in loaded.modules():
        if isinstance(module, Experts):
            linears = [linear for linear in module.modules() if isinstance(linear, torch.nn.Linear)]
            assert len({linear.weight.untyped_storage().data_ptr() for linear in linears}) == 2


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_every_layer_of_every_expert_is_quantised_and_runs(recipe, moe, tmp_path, calibration_text):
    """Routers are left as they are. At W4A16 the model answers as transformers does with the dequantised weights under the checkpoint's own names, and so do packed layers."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    folder, _ = moe
    reports = quantize_checkpoint(make_plan(folder, tmp_path / "out", recipe, tokens=512, sequence=64), calibration_text, threads=2)
    layers = sum(isinstance(module, Experts) for module in hf.load_model(folder).modules())
    assert len([name for name in reports if ".experts." in name]) == layers * 6 * 3 and not [name for name in reports if name.endswith("gate")]
    with torch.no_grad():
        packed, plain = (hf.load_quantized(tmp_path / "out", kernels=kernels)(input_ids=tokens()).logits for kernels in (True, False))
    assert torch.isfinite(packed).all() and torch.isfinite(plain).all()
    if recipe.activations:  # rounded inputs part where they lie near a tie, and routes with them
        return
    made = {name: torch.from_numpy(value.dequantize(unrotate=True) if isinstance(value, mg.QuantizedMatrix) else np.array(value, dtype=np.float32)) for name, value in mg.load(tmp_path / "out").items()}
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(made, dense / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()(input_ids=tokens()).logits
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-4)
    # A token whose second and third experts are all but equally likely may take another route; its own answers and later ones part then.
    assert ((packed - expected).abs().amax(-1) < 1e-3).float().mean() > 0.75


@pytest.mark.parametrize("recipe", ["mr-gptq W4A4", "best"])
def test_one_block_at_a_time_gives_the_same_bytes(recipe, moe, tmp_path, calibration_text, monkeypatch):
    for name, resident in (("whole", 1 << 40), ("streamed", 0)):
        monkeypatch.setattr(plan, "RESIDENT_BYTES", resident)
        made = make_plan(moe[0], tmp_path / name, RECIPES[recipe], tokens=512, sequence=64)
        assert made.streamed == (resident == 0)
        quantize_checkpoint(made, calibration_text, threads=2)
    assert contents(tmp_path / "streamed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "in workers"])
def test_an_expert_that_no_token_reaches_is_rounded_plainly_and_that_is_recorded(elsewhere, tmp_path, leaf_folder, calibration_text):
    """Its weights are what plain rounding makes of them, its inputs' scale is its fellows' and no infinite one."""
    model = make_moe("glm4_moe", tmp_path / "model", leaf_folder)
    model.model.layers[1].mlp.gate.e_score_correction_bias[3] = -1e4
    model.save_pretrained(tmp_path / "model")
    recipe = RECIPES["mr-gptq W4A4"]
    with ThreadPoolExecutor(2) as pool:
        reports = quantize_checkpoint(make_plan(tmp_path / "model", tmp_path / "out", recipe, tokens=512, sequence=64), calibration_text, threads=2, executor=pool if elsewhere else None)
    unreached = {name for name, report in reports.items() if report.tokens == 0}
    assert unreached == {f"model.layers.1.mlp.experts.3.{leaf}_proj" for leaf in ("gate", "up", "down")}
    weights, made = mg.load(tmp_path / "model"), mg.load(tmp_path / "out")
    rounding = replace(recipe, solver="rtn")
    for leaf in ("gate", "up", "down"):
        name = f"model.layers.1.mlp.experts.3.{leaf}_proj.weight"
        shared = made[name].tensor_scale
        plain = mg.quantize_layer(weights[name], None, rounding, tensor_scale=shared)
        assert "no token reached its inputs" in reports[name.removesuffix(".weight")].fallback and reports[name.removesuffix(".weight")].method == "rounding"
        np.testing.assert_array_equal(made[name].codes, plain.codes)
        np.testing.assert_array_equal(made[name].scales, plain.scales)
        fellows = [made[f"model.layers.1.mlp.experts.{e}.{leaf}_proj.weight"].activations.tensor_scale for e in range(6) if e != 3]
        assert np.isfinite(fellows).all() and made[name].activations.tensor_scale == min(fellows)


def test_cross_moments_are_of_the_tokens_that_the_quantised_model_routes(tmp_path, leaf_folder):
    """Summed here from forward passes by hand, a token each, so that most experts see nothing of most batches: the rows that the block's own router sends to an expert, and those that the original has at the same places."""
    make_moe("qwen3_moe", tmp_path / "model", leaf_folder)
    model, original = hf.load_model(tmp_path / "model"), hf.load_model(tmp_path / "model")
    states, moes = {"own": [], "original": []}, {"own": [], "original": []}

    def keep(name):
        def hook(module, args, kwargs):
            states[name].append((args[0].clone(), {key: value for key, value in kwargs.items() if key not in ("past_key_values", "use_cache")}))

        return hook

    with torch.no_grad():
        for parameter in model.model.layers[0].parameters():
            parameter *= 1.3  # inputs of the second block come apart, and some routes with them
        block, beside = model.model.layers[1], original.model.layers[1]
        for name, each in (("own", model), ("original", original)):
            with removing([each.model.layers[1].register_forward_pre_hook(keep(name), with_kwargs=True), each.model.layers[1].mlp.experts.register_forward_pre_hook(lambda module, args, name=name: moes[name].append(args))]):
                for token in tokens(40, 1):
                    each(input_ids=token[None], use_cache=False)
        names = [name for name, module in model.named_modules() if ".layers.1.mlp.experts." in name and isinstance(module, torch.nn.Linear)]
        named, groups = {name: model.get_submodule(name) for name in names}, fused_groups(names)
        apart = observe_both(block, beside, groups, named, [state for state, _ in states["own"]], [state for state, _ in states["original"]], {1: states["own"][0][1]})
        routes = [(set(own[1][0].tolist()), set(other[1][0].tolist())) for own, other in zip(moes["own"], moes["original"], strict=True)]
        assert sum(mine != other for mine, other in routes) > 3, "hardly a route differs, so the test shows little"
        for group in groups:
            expert, total = int(group[0].split(".experts.")[1].split(".")[0]), 0
            for (mine, _), (seen, *_), (asked, *_) in zip(routes, moes["own"], moes["original"], strict=True):
                if expert in mine:
                    if group[0].endswith("down_proj"):
                        asked, seen = (m.act_fn(m.get_submodule(f"{expert}.gate_proj")(x)) * m.get_submodule(f"{expert}.up_proj")(x) for m, x in ((beside.mlp.experts, asked), (block.mlp.experts, seen)))
                    total = total + (asked.T @ seen).double()
            torch.testing.assert_close(apart.crosses[group], total, rtol=1e-4, atol=1e-4)


def test_fused_tensors_of_a_checkpoint_stay_as_they_are_and_that_is_said(tmp_path, leaf_folder, caplog):
    """gpt-oss has transposed experts with biases: no expert's layer has a name to quantise it by."""
    from transformers import AutoModelForCausalLM, GptOssConfig

    config = GptOssConfig(vocab_size=1024, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=16, num_local_experts=4, num_experts_per_tok=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    for path in leaf_folder.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "model")
    quantize_checkpoint(make_plan(tmp_path / "model", tmp_path / "out", mg.Recipe.named("rtn")))
    assert any("mlp.experts.down_proj" in record.getMessage() and "rank 3" in record.getMessage() for record in caplog.records)
    kept, before = mg.load(tmp_path / "out"), mg.load(tmp_path / "model")
    name = "model.layers.0.mlp.experts.down_proj"
    np.testing.assert_array_equal(np.asarray(kept[name]), np.asarray(before[name]))
    assert not isinstance(decoder_blocks(hf.load_model(tmp_path / "model"))[1][0].mlp.experts, Experts)


@pytest.mark.parametrize("form", [("has_gate", False), ("has_bias", True), ("is_transposed", True), ("is_concatenated", False), ("has_post_expert_norm", True), ("gate", None)], ids=lambda form: form[0])
def test_experts_of_another_form_are_left_alone(form, tmp_path, leaf_folder):
    """Whatever transformers' decorator says of a class that our forward pass does not do; a gate of its own, too."""
    model = make_moe("mixtral", tmp_path / "model", leaf_folder)
    names = set(mg.load(tmp_path / "model"))
    for block in model.model.layers:
        if form[0] == "gate":
            block.mlp.experts.__class__ = type("Gated", (type(block.mlp.experts),), {"_apply_gate": lambda self, both: both})
        else:
            setattr(block.mlp.experts, *form)
    split_experts(model, names)
    assert not any(isinstance(module, Experts) for module in model.modules())
    for block in model.model.layers:
        if form[0] == "gate":
            block.mlp.experts.__class__ = type(block.mlp.experts).__mro__[1]
        else:
            setattr(block.mlp.experts, form[0], not form[1])
    split_experts(model, names)
    assert sum(isinstance(module, Experts) for module in model.modules()) == 2
