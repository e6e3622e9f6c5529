"""compressed-tensors both ways: transformers computes with our checkpoints what a dense model of their values does, and we read what the library wrote or somebody damaged."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from compressed_tensors.transform import TransformConfig, apply_transform_config
from scipy.linalg import hadamard
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import mrgptq as mg
from mrgptq.checkpoint import compressed_tensors
from mrgptq.jobs import quantize_checkpoint
from mrgptq.plan import make_plan, with_rotation

SCHEMES = [(format, activations, rotation) for format, k in (("nvfp4", 16), ("mxfp4", 32)) for activations in (None, format) for rotation in (None, k)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, leaf_folder, calibration_text):
    """A function that gives the folder of leaf quantised by MR-GPTQ, or another recipe as it stands, under 2048 tokens, so with real calibrated input scales; made once. In shards: read and
    saved anew."""
    folder, made = tmp_path_factory.mktemp("exported"), {}

    def export(format, activations, rotation, shard_bytes=None, name="mr-gptq"):
        key = (format, activations, rotation, shard_bytes, name)
        if key in made:
            pass
        elif shard_bytes:
            whole = export(format, activations, rotation, name=name)
            made[key] = folder / "-".join(map(str, key))
            mg.save(made[key], mg.load(whole), config=json.loads((whole / "config.json").read_text()), max_shard_bytes=shard_bytes)
        else:
            recipe = mg.Recipe.named(name, format, activations=activations)
            if name == "mr-gptq":
                recipe = with_rotation(recipe, rotation or 0)
            assert recipe.rotation == rotation
            plan = make_plan(leaf_folder, folder / "-".join(map(str, key)), recipe, tokens=2048, sequence=256)
            quantize_checkpoint(plan, calibration_text)
            made[key] = plan.out
        return made[key]

    return export


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 1024, (3, 96), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, tokens):
    assert model.dtype == torch.bfloat16
    values = model.eval()(input_ids=tokens, use_cache=False).logits
    assert values.dtype == torch.bfloat16 and torch.isfinite(values).all()
    return values


def input_hook(activations, rotation):
    """The inputs that a layer's product takes: rotated by compressed-tensors' arithmetic (a bfloat16 product with ±1, divided by sqrt(k)), then rounded by our activation rule."""
    matrix = torch.from_numpy(hadamard(rotation)).bfloat16() if rotation else None

    def hook(module, args):
        x = args[0]
        assert x.dtype == torch.bfloat16
        if rotation:
            x = (x.unflatten(-1, (-1, rotation)) @ matrix / torch.tensor(rotation, dtype=torch.float64).sqrt()).flatten(-2)
        if activations:
            bits = x.contiguous().view(torch.uint16).numpy()
            values = mg.round_activations(bits, activations.format, mx_rule=activations.mx_rule, tensor_scale=activations.tensor_scale, dtype="bfloat16")
            x = torch.from_numpy(values).bfloat16()
        return (x,)

    return hook


def dense(leaf_folder, folder):
    """Leaf in bfloat16 with the checkpoint's dequantised (still rotated) weights in it and their inputs hooked; no code of compressed-tensors."""
    model = AutoModelForCausalLM.from_pretrained(leaf_folder, dtype=torch.bfloat16)
    layers = {name.removesuffix(".weight"): matrix for name, matrix in mg.load(folder).items() if isinstance(matrix, mg.QuantizedMatrix)}
    assert len(layers) == 28
    for name, matrix in layers.items():
        module = model.get_submodule(name)
        module.weight.data = torch.from_numpy(matrix.dequantize()).bfloat16()
        module.register_forward_pre_hook(input_hook(matrix.activations, matrix.rotation.block_size))
    return model


def run_card(folder):
    """The loading code of the checkpoint's own model card, as a reader would run it."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL).group(1)
    assert code.count('path = "..."') == 1
    names = {}
    exec(code.replace('path = "..."', f"path = {str(folder)!r}"), names)
    return names["model"]


@pytest.mark.parametrize("shard_bytes", [None, 300_000], ids=["one file", "shards"])
@pytest.mark.parametrize(("format", "activations", "rotation"), SCHEMES)
def test_transformers_computes_what_a_dense_model_of_our_values_does(format, activations, rotation, shard_bytes, exported, leaf_folder, tokens):
    folder = exported(format, activations, rotation, shard_bytes)
    assert (len(list(folder.glob("*.safetensors"))) > 2) == bool(shard_bytes)
    model = run_card(folder) if rotation else AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(model, tokens), logits(dense(leaf_folder, folder), tokens))


@pytest.mark.parametrize("shard_bytes", [None, 300_000], ids=["one file", "shards"])
@pytest.mark.parametrize(("format", "activations"), [(format, activations) for format, activations, rotation in SCHEMES if rotation is None])
def test_the_recipe_best_is_loaded_by_from_pretrained_alone(format, activations, shard_bytes, exported, leaf_folder, tokens):
    """Scales chosen inside GPTQ and refined are bytes like any others: without a rotation there is nothing that a loader must do for them."""
    folder = exported(format, activations, None, shard_bytes, "best")
    answers = logits(AutoModelForCausalLM.from_pretrained(folder), tokens)
    assert torch.equal(answers, logits(dense(leaf_folder, folder), tokens))
    assert not torch.equal(answers, logits(AutoModelForCausalLM.from_pretrained(exported(format, activations, None)), tokens))  # these are not mr-gptq's
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and not config["transform_config"]
    assert not any(name.endswith("v_input.weight") for path in folder.glob("*.safetensors") for name in safetensors.torch.load_file(path))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_model_of_another_type_loads_like_one_of_bfloat16(dtype, key, leaf_folder, tokens, tmp_path, caplog):
    """compressed-tensors unpacks to bfloat16 whatever the model's type, so config.json has to say so; leaf's bfloat16 values are none other in float32, and in float16 but for the faintest."""
    source = tmp_path / "source"
    shutil.copytree(leaf_folder, source)
    values = safetensors.torch.load_file(source / "model.safetensors")
    safetensors.torch.save_file({name: value.to(dtype) for name, value in values.items()}, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    name = str(dtype).removeprefix("torch.")
    (source / "config.json").write_text(json.dumps(config | ({key: name} if key else {})))
    for folder, out in ((source, tmp_path / "out"), (leaf_folder, tmp_path / "expected")):
        quantize_checkpoint(make_plan(folder, out, mg.Recipe.named("rtn")))
    assert [record.getMessage() for record in caplog.records] == [f"config.json will say {key} bfloat16 instead of {name}: the loaders of compressed-tensors unpack weights to it"] * bool(key)
    got, expected = (logits(AutoModelForCausalLM.from_pretrained(tmp_path / folder), tokens) for folder in ("out", "expected"))
    assert torch.equal(got, expected) if dtype == torch.float32 else (got - expected).float().std() < 0.1 * expected.float().std()


def test_the_type_is_set_wherever_a_configuration_names_it():
    config = {"torch_dtype": "float16", "text_config": {"dtype": "float32", "hidden_size": 64}, "vision_config": {"dtype": "float32"}}
    expected = {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "hidden_size": 64}, "vision_config": {"dtype": "float32"}}
    assert compressed_tensors.model_config(config) == expected and config["text_config"]["dtype"] == "float32"


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_the_rounding_of_inputs_is_part_of_the_answer(format, exported, leaf_folder, tokens):
    """Or the comparison above would hold for a loader that leaves it out."""
    w4a16, w4a4 = (logits(AutoModelForCausalLM.from_pretrained(exported(format, activations, None)), tokens) for activations in (None, format))
    original = logits(AutoModelForCausalLM.from_pretrained(leaf_folder, dtype=torch.bfloat16), tokens)
    assert (w4a4 - original).float().std() > 1.2 * (w4a16 - original).float().std() > 0


@pytest.mark.parametrize(("format", "rotation"), [("nvfp4", 16), ("mxfp4", 32)])
def test_the_trap_a_rotated_checkpoint_without_its_transform_answers_nonsense(format, rotation, exported, leaf_folder):
    """transformers 5.23 ignores transform_config: no error, but on real text the answers are worse than guessing among the 1024 tokens. What applies it is said in the card."""
    folder = exported(format, None, rotation)
    text = (leaf_folder.parent.parent / "text" / "test.txt").read_text(encoding="utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(leaf_folder)(text[:4000], add_special_tokens=False)["input_ids"][:512])[None]

    def perplexity(model):
        return torch.nn.functional.cross_entropy(logits(model, ids)[0, :-1].float(), ids[0, 1:]).exp().item()

    original = perplexity(AutoModelForCausalLM.from_pretrained(leaf_folder, dtype=torch.bfloat16))
    assert original < perplexity(run_card(folder)) < 1.5 * original < 100
    assert perplexity(AutoModelForCausalLM.from_pretrained(folder)) > 1024
    assert "transformers ignores it" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("rotation", [None, 32])
@pytest.mark.parametrize("preset", ["NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4"])
def test_a_checkpoint_that_the_library_wrote_reads_as_the_library_reads_it(preset, rotation, tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96))
    originals = {name: module.weight.detach().clone() for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if rotation:
        apply = [{"targets": ["Linear"], "location": location, "inverse": inverse, "ignore": ["lm_head"]} for location, inverse in (("input", False), ("weight_input", True))]
        apply_transform_config(model, TransformConfig.model_validate({"config_groups": {"v": {"type": "hadamard", "head_dim": rotation, "precision": "torch.bfloat16", "apply": apply}}}))
    scheme = preset_name_to_scheme(preset, ["Linear"])
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    quantised = {name: module for name, module in model.named_modules() if getattr(module, "quantization_scheme", None)}
    assert len(quantised) == 14
    for i, module in enumerate(quantised.values()):
        weight, global_scale = module.weight.detach(), None
        groups = weight.unflatten(-1, (-1, scheme.weights.group_size))
        if preset.startswith("NVFP4"):
            global_scale = generate_gparam(weight.min(), weight.max())
            module.weight_global_scale.data.copy_(global_scale)
        module.weight_scale.data.copy_(calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights, global_scale=global_scale)[0])
        if preset == "NVFP4":
            module.input_global_scale.data.fill_(100.0 + i)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.transform_config = getattr(model, "transform_config", None)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "out")
    compressor.update_config(tmp_path / "out")

    loaded = mg.load(tmp_path / "out")
    compressor.decompress_model(model)
    assert {name for name, value in loaded.items() if isinstance(value, mg.QuantizedMatrix)} == {f"{name}.weight" for name in quantised}
    for i, (name, module) in enumerate(quantised.items()):
        matrix = loaded[f"{name}.weight"]
        assert torch.equal(torch.from_numpy(matrix.dequantize()).to(module.weight.dtype), module.weight.detach())
        assert matrix.rotation.block_size == rotation
        assert matrix.activations == {"NVFP4": mg.Activations("nvfp4", tensor_scale=100.0 + i), "MXFP4": mg.Activations("mxfp4")}.get(preset)
        # Back in the original basis it is the original up to rounding: a 4-bit float with block scales keeps a normal matrix to about 1 % of its energy.
        error = torch.from_numpy(matrix.dequantize(unrotate=True)) - originals[name]
        assert error.square().sum() < 0.03 * originals[name].square().sum()
    assert np.array_equal(np.asarray(loaded["lm_head.weight"]), originals["lm_head"].numpy())


LAYER = "model.layers.2.mlp.up_proj"


def damage(name, change):
    """A change of one tensor: what ``change`` makes of it, or None to leave it out."""

    def apply(tensors, config):
        changed = change(tensors.pop(f"{LAYER}.{name}"))
        if changed is not None:
            tensors[f"{LAYER}.{name}"] = changed

    return apply


def setting(*path, value):
    """A change of one key of quantization_config."""

    def apply(tensors, config):
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return apply


GROUP = ("config_groups", "group_0")
TRANSFORM = {"config_groups": {"v": {"type": "hadamard", "head_dim": 16, "apply": [{"targets": ["Linear"], "location": location} for location in ("input", "weight_input")]}}}
DAMAGED = {
    "no scales": (damage("weight_scale", lambda t: None), (f"no tensor '{LAYER}.weight_scale'",)),
    "no divisor": (damage("weight_global_scale", lambda t: None), (LAYER, "weight_global_scale")),
    "no input scale": (damage("input_global_scale", lambda t: None), (LAYER, "input_global_scale")),
    "scales as U8": (damage("weight_scale", lambda t: t.view(torch.uint8)), (LAYER, "weight_scale is U8", "F8_E4M3 matrix")),
    "scales as BF16": (damage("weight_scale", lambda t: t.bfloat16()), (LAYER, "weight_scale is BF16", "F8_E4M3 matrix")),
    "codes as I8": (damage("weight_packed", lambda t: t.view(torch.int8)), (LAYER, "weight_packed is I8", "U8 matrix")),
    "codes as a vector": (damage("weight_packed", lambda t: t.flatten()), (LAYER, "weight_packed", "(24576,)", "U8 matrix")),
    "too few scales": (damage("weight_scale", lambda t: t[:, 1:].contiguous()), (LAYER, "(384, 7)", "do not fit")),
    "divisor 0": (damage("weight_global_scale", torch.zeros_like), (LAYER, "weight_global_scale is [0.0]", "positive")),
    "divisor NaN": (damage("weight_global_scale", lambda t: t * torch.nan), (LAYER, "weight_global_scale is [nan]", "positive")),
    "two divisors": (damage("weight_global_scale", lambda t: t.repeat(2)), (LAYER, "weight_global_scale", "one positive number")),
    "another method": (setting("quant_method", value="gptq"), ("'gptq'", "compressed-tensors, fp_quant")),
    "8 bits": (setting(*GROUP, "weights", "num_bits", value=8), ("8 bits", "nvfp4 (4, float, 16)")),
    "integers": (setting(*GROUP, "weights", "type", value="int"), ("'int'", "mxfp4 (4, float, 32)")),
    "group size 128": (setting(*GROUP, "weights", "group_size", value=128), ("group size 128", "mxfp4 (4, float, 32)")),
    "no groups": (setting("config_groups", value={}), ("0 config_groups", "one")),
    "two groups": (lambda tensors, config: config["config_groups"].update(group_1=config["config_groups"]["group_0"]), ("2 config_groups", "one")),
    "random rotation": (setting("transform_config", value={"config_groups": {"v": TRANSFORM["config_groups"]["v"] | {"type": "random-hadamard"}}}), ("transform_config", "plain Hadamard")),
    "permuted rotation": (setting("transform_config", value={"config_groups": {"v": TRANSFORM["config_groups"]["v"] | {"randomize": True}}}), ("transform_config", "plain Hadamard")),
    "rotated outputs": (setting("transform_config", value={"config_groups": {"u": TRANSFORM["config_groups"]["v"] | {"apply": [{"location": "output"}]}}}), ("transform_config", "input side")),
    "rotation of any size": (setting("transform_config", value={"config_groups": {"v": TRANSFORM["config_groups"]["v"] | {"head_dim": None}}}), ("transform_config", "head_dim")),
    "rotation by 12": (setting("transform_config", value={"config_groups": {"v": TRANSFORM["config_groups"]["v"] | {"head_dim": 12}}}), ("block_size is 12", "power of two")),
    "two rotations of one layer": (setting("transform_config", value={"config_groups": {"v": TRANSFORM["config_groups"]["v"], "w": TRANSFORM["config_groups"]["v"]}}), ("2 transforms", "at most one")),
    "a rotation of no layer": (setting("transform_config", value={"config_groups": {"v": TRANSFORM["config_groups"]["v"] | {"apply": [{"location": "input"}, {"location": "weight_input"}]}}}), ("targets None", "list of names")),
    "rotation that does not fit": (setting("transform_config", value={"config_groups": {"v": TRANSFORM["config_groups"]["v"] | {"head_dim": 256}}}), ("384 columns", "block size 256")),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_missing_or_foreign_is_refused_by_name(case, exported, tmp_path):
    change, words = DAMAGED[case]
    folder = exported("nvfp4", "nvfp4", None)
    tensors, config = safetensors.torch.load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as refusal:
        mg.load(tmp_path)
    assert all(word in str(refusal.value) for word in (*words, str(tmp_path))), refusal.value


@pytest.mark.parametrize(("part", "words"), [("forward_dtype", ("'int4'", "nvfp4, mxfp4")), ("forward_hadamard_matrix", ("neither the identity nor a Sylvester-Hadamard", LAYER)), ("act_global_scale", (LAYER, "act_global_scale"))])
def test_fp_quant_refuses_likewise(part, words, tmp_path):
    matrix = mg.quantize_layer(np.eye(32), None, replace(mg.Recipe.named("rtn", "mxfp4", "fp_quant", "mxfp4"), rotation=32))
    mg.save(tmp_path / "out", {f"{LAYER}.weight": matrix}, "fp_quant")
    tensors, config = safetensors.torch.load_file(tmp_path / "out/model.safetensors"), json.loads((tmp_path / "out/config.json").read_text())
    if part == "forward_dtype":
        config["quantization_config"][part] = "int4"
    elif part == "act_global_scale":
        del tensors[f"{LAYER}.{part}"]
    else:
        tensors[f"{LAYER}.{part}"] = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0].bfloat16().contiguous()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as refusal:
        mg.load(tmp_path)
    assert all(word in str(refusal.value) for word in (*words, str(tmp_path))), refusal.value
