"""Calibration block by block, against transformers' own models with independent hooks."""

import importlib
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from scipy.linalg import block_diag, hadamard

import mrgptq as mg
from mrgptq import group, hf

SEQUENCE = 24
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 160, "max_position_embeddings": 64}
DECODERS = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Qwen3": {"tie_word_embeddings": False},  # norms of q and k
    "Qwen2": {},  # biases of q, k and v
    "Mistral": {"sliding_window": 8},
    "Gemma2": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "query_pre_attn_scalar": 16},
    "Gemma3Text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "query_pre_attn_scalar": 16},  # rotary embeddings by layer, too
}
LEAVES = [f"self_attn.{leaf}_proj" for leaf in "qkvo"] + [f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down")]
FUSED = [LEAVES[0:3], LEAVES[3:4], LEAVES[4:6], LEAVES[6:7]]


def decoder(name):
    """A random model of that family, float32. One dead input of every MLP and weights of different sizes, so that nothing is symmetric by chance."""
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**(SMALL | DECODERS[name]))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for i, module in enumerate(m for m in model.modules() if isinstance(m, torch.nn.Linear)):
            module.weight.mul_(4 + i % 5)
            if module.bias is not None:
                module.bias.normal_(std=0.1)
    return model


def random_tokens(windows, vocabulary=160):
    return torch.randint(0, vocabulary, (windows, SEQUENCE), generator=torch.Generator().manual_seed(windows))


def names_in(block):
    return [f"model.layers.{block}.{leaf}" for leaf in LEAVES]


class Captured(dict):
    """{layer: (tokens, cols) inputs} that hooks noted while ``inputs`` went through the model in the batches of calibration, whose products are the same then."""

    @torch.no_grad()
    def __init__(self, model, names, inputs, batch=8):
        super().__init__({name: [] for name in names})
        modules = {name: model.get_submodule(name) for name in names}
        handles = [module.register_forward_pre_hook(lambda m, args, name=name: self[name].append(args[0].flatten(0, -2)), prepend=True) for name, module in modules.items()]
        for part in inputs.split(batch):
            model(input_ids=part, use_cache=False)
        for handle in handles:
            handle.remove()
        self.update({name: torch.cat(parts) for name, parts in self.items()})


@pytest.fixture
def noted(monkeypatch):
    """The Hessians under which calibration quantises, by layer in order. What a factor was made of is gone by then: a block's Hessians are the most that calibration holds."""
    seen, of_group, used_up = [], [], []
    make_factor, quantize_layer = group.make_factor, group.quantize_layer

    def make(hessian, recipe, **options):
        of_group.append(hessian.matrix)
        used_up.append(weakref.ref(hessian._sum))
        return make_factor(hessian, recipe, **options)

    def spy(weight, hessian, recipe, **options):
        assert hessian is not None or used_up[-1]() is None
        seen.append(of_group[-1] if hessian is None else hessian.matrix)
        return quantize_layer(weight, hessian, recipe, **options)

    monkeypatch.setattr(group, "make_factor", make)
    monkeypatch.setattr(group, "quantize_layer", spy)
    return seen


def quantise(model, inputs, recipe, noted=None, **options):
    """{layer: QuantizedMatrix}, and {layer: Hessian} where ``noted``."""
    names = [name for block in range(len(model.model.layers)) for name in names_in(block)]
    matrices = dict(hf.calibrate(model, inputs, recipe, names, **options))
    assert list(matrices) == names
    return matrices if noted is None else (matrices, dict(zip(names, noted, strict=True)))


def assert_is_cross_moment(cross, x, seen):
    """X^T X̃ / tokens. Calibration multiplies a batch in float32, 8 windows of 24 tokens: gamma = 192 u / (1 - 192 u), u = 2^-24, of the sum of magnitudes, and sums batches in float64."""
    x, seen = x.double().numpy(), seen.double().numpy()
    assert np.all(np.abs(cross - x.T @ seen / len(x)) <= 1.2e-5 * (np.abs(x).T @ np.abs(seen)) / len(x) + 1e-300)


def residual_stream(model, inputs, batch=8):
    """What each block adds attention to, and what it adds the MLP to: two lists of (tokens, hidden)."""
    with torch.no_grad():
        blocks = model.model.layers
        before, middle = [[] for _ in blocks], [[] for _ in blocks]
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda m, args, i=i: before[i].append(args[0].flatten(0, -2)))
            block.post_attention_layernorm.register_forward_pre_hook(lambda m, args, i=i: middle[i].append(args[0].flatten(0, -2)))
        for part in inputs.split(batch):
            model(input_ids=part, use_cache=False)
    return [torch.cat(parts) for parts in before], [torch.cat(parts) for parts in middle]


def assert_is_stream_moment(stream, asked, own, seen):
    """(S - S̃)^T X̃ / tokens. Calibration finds the stream before the MLP by taking the MLP's output from the block's: each of four float32 operations rounds by 2^-24 of the largest number in
    them, here at most four times the stream's own; a batch's product as in assert_is_cross_moment."""
    asked, own, seen = asked.double().numpy(), own.double().numpy(), seen.double().numpy()
    off = 16 * 2.0**-24 * max(np.abs(asked).max(), np.abs(own).max())
    assert np.all(np.abs(stream - (asked - own).T @ seen / len(seen)) <= (1.2e-5 * np.abs(asked - own).T + off) @ np.abs(seen) / len(seen))


def assert_is_second_moment(hessian, x):
    """X^T X / tokens. Ours sums panels of 256 products in float32: each entry is off by at most gamma = 256 u / (1 - 256 u), u = 2^-24, of the sum of magnitudes."""
    x = x.double().numpy()
    assert hessian.shape == (x.shape[1],) * 2
    assert np.all(np.abs(hessian - x.T @ x / len(x)) <= 1.6e-5 * (np.abs(x).T @ np.abs(x)) / len(x) + 1e-300)
    assert np.trace(hessian) > 0


def put(model, matrices, names, *, hooks=False):
    """Write dequantised weights, in the original basis, into a model; with ``hooks`` its inputs are rounded, too, as mg.round_activations says."""
    for name in names:
        module, matrix = model.get_submodule(name), matrices[name]
        module.weight.data = torch.from_numpy(matrix.dequantize(unrotate=True))
        if hooks:
            round_inputs(module, matrix.activations.format, matrix.rotation, matrix.activations.tensor_scale)


def round_inputs(module, format, rotation, tensor_scale=None):
    def hook(module, args):
        x = rotation.apply(args[0].detach().numpy())
        return (torch.from_numpy(rotation.apply_inverse(mg.round_activations(x, format, tensor_scale=tensor_scale))),)

    module.register_forward_pre_hook(hook)


@pytest.mark.parametrize(("name", "batch"), [*((name, 8) for name in DECODERS), ("Mistral", 4)])
def test_each_block_is_calibrated_on_what_the_quantised_blocks_before_it_give(name, batch, noted):
    """Blocks 0, 1 and 2 against an independent model that holds the dequantised weights of the blocks before. 11 windows: the last batch has 3, and masks of another shape."""
    inputs = random_tokens(11)
    matrices, hessians = quantise(decoder(name), inputs, mg.Recipe.named("mr-gptq", "mxfp4"), noted, batch_windows=batch)
    independent = decoder(name)
    for block in range(3):
        for layer, x in Captured(independent, names_in(block), inputs, batch).items():
            assert len(x) == 11 * SEQUENCE == matrices[layer].report.tokens
            assert_is_second_moment(hessians[layer], x)
        put(independent, matrices, names_in(block))


@pytest.fixture
def crossed(monkeypatch):
    """The (cross, stream) moments that calibration hands to quantize_layer, in order; None where it hands none."""
    seen = []
    original = group.quantize_layer

    def spy(weight, hessian, recipe, **options):
        seen.append((options.get("cross"), options.get("stream")))
        return original(weight, hessian, recipe, **options)

    monkeypatch.setattr(group, "quantize_layer", spy)
    return seen


@pytest.mark.parametrize(("name", "format", "rotation", "activations"), [("Llama", "nvfp4", None, None), ("Gemma2", "mxfp4", 32, None), ("Qwen3", "nvfp4", 16, "nvfp4"), ("Qwen3", "mxfp4", None, "mxfp4")])
def test_the_cross_moment_sets_the_original_models_inputs_against_those_of_the_quantised_one(name, format, rotation, activations, noted, crossed):
    """X by a pass through the untouched model; X̃ by one through a model that holds the dequantised weights of the blocks before and, at W4A4, rounds as calibration does, noted before rounding.
    In the first block of W4A16 they are the same. 11 windows: two batches, and the cross moment is in the original basis."""
    inputs = random_tokens(11)
    recipe = mg.Recipe(format, rotation=rotation, scales="gptq", order="group", rounds=1, cross=0.5, activations=activations)
    matrices, hessians = quantise(decoder(name), inputs, recipe, noted)
    moments = dict(zip(matrices, crossed, strict=True))
    turn = mg.Hadamard(rotation) if rotation else mg.Identity()
    original, (incoming, middle) = Captured(decoder(name), list(matrices), inputs), residual_stream(decoder(name), inputs)
    apart = 0
    for block in range(3):
        independent = decoder(name)
        for before in range(block):
            put(independent, matrices, names_in(before), hooks=activations is not None)
        if activations:
            for layer in names_in(block):
                round_inputs(independent.get_submodule(layer), format, turn)
        own_incoming, own_middle = residual_stream(independent, inputs)
        for layer, seen in Captured(independent, names_in(block), inputs).items():
            cross, stream = moments[layer]
            assert_is_second_moment(hessians[layer], seen)
            assert_is_cross_moment(cross, original[layer], seen)
            assert matrices[layer].report.cross == 0.5
            apart += np.abs(cross - cross.T).max() > 1e-3 * np.abs(cross).max()  # what tells X^T X̃ from X̃^T X
            # Gemma 2 puts norms behind attention and MLP: no linear layer of it writes into the stream.
            writes = {LEAVES[3]: (incoming, own_incoming), LEAVES[6]: (middle, own_middle)}.get(layer.split(".", 3)[3]) if name != "Gemma2" else None
            assert (stream is not None) == (writes is not None)
            if writes:
                assert_is_stream_moment(stream, writes[0][block], writes[1][block], seen)
                assert (np.abs(stream).max() > 1e-4) == (block > 0 or (activations is not None and layer.endswith("down_proj")))
    assert apart >= 10


@pytest.mark.parametrize(
    ("name", "more", "writers"),
    [
        ("Llama", {}, ("self_attn.o_proj", "mlp.down_proj")),
        ("Gemma2", {}, (None, None)),  # norms behind attention and MLP
        ("Granite", {"residual_multiplier": 0.5}, (None, None)),
        ("GPTNeoX", {"use_parallel_residual": True}, (None, None)),  # both added to one input
        ("GPTNeoX", {"use_parallel_residual": False}, ("attention.dense", "mlp.dense_4h_to_h")),
        ("Mixtral", {"num_local_experts": 4}, ("self_attn.o_proj", None)),  # experts' outputs are weighted
        ("Phimoe", {"num_local_experts": 4}, ("self_attn.o_proj", None)),  # and the router is a linear layer that gives a pair
    ],
)
def test_the_layers_that_write_into_the_residual_stream_are_told_by_what_they_do(name, more, writers):
    """Against what transformers' sources say of each family."""
    torch.manual_seed(5)
    config = getattr(transformers, f"{name}Config")(**(SMALL | DECODERS.get(name, {}) | more))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    passage, beside = (importlib.import_module(f"mrgptq.hf.{name}") for name in ("passage", "beside"))
    _, blocks = importlib.import_module("mrgptq.hf.model").decoder_blocks(model)
    with torch.no_grad():
        hidden, kwargs = passage.enter(model, blocks, random_tokens(3), 2)
        assert len(hidden[-1]) == 1 and beside.stream_writers(blocks[0], hidden[-1], kwargs[0]) == writers
        assert all(not module._forward_hooks for module in blocks[0].modules())


def test_hidden_states_stay_in_the_memory_that_they_came_in():
    """Block after block, the original's too; where a block gives another dtype its output is taken as it is."""
    config = transformers.LlamaConfig(**(SMALL | {"num_attention_heads": 4, "num_key_value_heads": 4}))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    passage, beside, blocks = (importlib.import_module(f"mrgptq.hf.{name}") for name in ("passage", "beside", "blocks"))
    with torch.no_grad():
        hidden, kwargs = passage.enter(model, model.model.layers, random_tokens(3), 2)
        expected = [blocks.run_block(model.model.layers[0], batch, kwargs[0]) for batch in hidden]
        own, original = [batch.clone() for batch in hidden], [batch.clone() for batch in hidden]
        places = [batch.data_ptr() for batch in (*own, *original)]
        beside.observe_both(model.model.layers[0], model.model.layers[0], [], {}, own, original, kwargs[0])
        assert all(torch.equal(a, b) for a, b in zip((*own, *original), (*hidden, *expected), strict=True))
        passage.run_batches(model.model.layers[0], own, kwargs[0], keep=True)
        assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))
        assert [batch.data_ptr() for batch in (*own, *original)] == places
        wide = expected[0].double()
        assert blocks.take_place(own[0], wide) is wide


@pytest.mark.parametrize("zero", ["self_attn.o_proj", "mlp.down_proj", "self_attn.q_proj"])
def test_a_layer_that_adds_nothing_does_not_pass_for_a_writer(zero):
    """The stream plus zero is the stream, which is read and left by many."""
    torch.manual_seed(5)
    config = transformers.LlamaConfig(**(SMALL | {"num_attention_heads": 4, "num_key_value_heads": 4}))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    passage, beside = (importlib.import_module(f"mrgptq.hf.{name}") for name in ("passage", "beside"))
    blocks = model.model.layers
    with torch.no_grad():
        blocks[0].get_submodule(zero).weight.zero_()
        hidden, kwargs = passage.enter(model, blocks, random_tokens(3), 2)
        assert blocks[0].get_submodule(zero)(torch.zeros(1, blocks[0].get_submodule(zero).in_features)).shape[-1] == hidden[0].shape[-1]
        writers = beside.stream_writers(blocks[0], hidden[-1], kwargs[0])
    assert zero not in writers and (writers == ("self_attn.o_proj", "mlp.down_proj") or zero != "self_attn.q_proj")


def test_without_cross_no_second_pass_is_made_and_nothing_changes(noted, crossed, monkeypatch):
    """The original block is copied for cross alone; where it is 0 the codes are those of each layer alone, under the Hessian noted."""
    model, inputs = decoder("Llama"), random_tokens(3)
    monkeypatch.setattr(type(model.model.layers[0]), "__deepcopy__", lambda *_: pytest.fail("a block was copied"), raising=False)
    weights = {name: model.get_submodule(name).weight.detach().numpy().copy() for name in names_in(0)}
    matrices, hessians = quantise(model, inputs, mg.Recipe("mxfp4", scales="gptq", order="group", rounds=1), noted)
    assert crossed == [(None, None)] * 21
    for name, weight in weights.items():
        alone = mg.quantize_layer(weight, hessians[name], matrices[name].recipe)
        assert np.array_equal(matrices[name].codes, alone.codes) and np.array_equal(matrices[name].scales, alone.scales)
        assert matrices[name].report.cross == 0.0


@pytest.mark.parametrize(("format", "rotation"), [("nvfp4", None), ("nvfp4", 16), ("mxfp4", 32)])
def test_at_w4a4_a_block_sees_rounded_inputs_but_a_hessian_is_taken_before_its_own(format, rotation, noted):
    """In a block under observation weights are the original ones and each batch has its own scale; blocks before it compute with calibrated scales. 6 windows: one batch."""
    inputs = random_tokens(6)
    recipe = replace(mg.Recipe.named("gptq", format, activations=format), rotation=rotation)
    matrices, hessians = quantise(decoder("Qwen3"), inputs, recipe, noted)
    turn = mg.Hadamard(rotation) if rotation else mg.Identity()
    for block in range(3):
        independent = decoder("Qwen3")
        for before in range(block):
            put(independent, matrices, names_in(before), hooks=True)
        for layer in names_in(block):
            round_inputs(independent.get_submodule(layer), format, turn)
        for layer, x in Captured(independent, names_in(block), inputs).items():
            assert_is_second_moment(hessians[layer], x)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_the_model_is_left_as_its_checkpoint_will_compute(format):
    """At W4A4, with the scales that the matrices carry, not those of the observation."""
    inputs, probe = random_tokens(3), random_tokens(2)
    model, independent = decoder("Qwen3"), decoder("Qwen3")
    matrices = quantise(model, inputs, mg.Recipe.named("mr-gptq", format, activations=format))
    put(independent, matrices, matrices, hooks=True)
    with torch.no_grad():
        got, expected, original = (m(input_ids=probe).logits for m in (model, independent, decoder("Qwen3")))
    assert torch.equal(got, expected) and (got - original).abs().max() > 0.01


@pytest.mark.parametrize("rotation", [None, 16])
def test_tensor_scales_are_those_of_the_fused_set(rotation):
    """2688 / the largest magnitude of q, k and v (gate and up) together, of weights and of inputs; rotated by a float64 product with scipy's matrix."""
    inputs = random_tokens(11)
    recipe = replace(mg.Recipe.named("rtn", "nvfp4", activations="nvfp4"), rotation=rotation)
    matrices = quantise(decoder("Qwen3"), inputs, recipe)
    independent = decoder("Qwen3")
    for layer in names_in(0):
        round_inputs(independent.get_submodule(layer), "nvfp4", mg.Hadamard(rotation) if rotation else mg.Identity())
    captured = Captured(independent, names_in(0), inputs)

    def scale(matrices):
        tall = torch.cat(matrices)
        if rotation:
            blocks = tall.shape[1] // rotation
            tall = (tall.double() @ torch.from_numpy(block_diag(*[hadamard(rotation)] * blocks) / rotation**0.5)).float()
        return float(np.float32(2688 / float(tall.abs().max())))

    # Unrotated the quotient rounded once. Rotated, float32 butterflies are off by log2(16) u of the group's norm, at most sqrt(16) times its largest magnitude: 4 * 4 * 2^-24.
    tolerance = 1e-6 if rotation else 0
    original = decoder("Qwen3")
    for leaves in FUSED:
        names = [f"model.layers.0.{leaf}" for leaf in leaves]
        weight_scale, input_scale = scale([original.get_submodule(name).weight.detach() for name in names]), scale([captured[name] for name in names])
        for name in names:
            assert matrices[name].tensor_scale == pytest.approx(weight_scale, rel=tolerance, abs=0)
            assert matrices[name].activations.tensor_scale == pytest.approx(input_scale, rel=tolerance, abs=0)
    own = {scale([original.get_submodule(name).weight.detach()]) for name in names_in(0)[:3]}
    assert len(own) == 3  # or "equal within q, k and v" would say nothing


def test_layers_left_out_keep_their_weights_and_a_dead_input_is_counted():
    model, original = decoder("Llama"), decoder("Llama")
    with torch.no_grad():
        for m in (model, original):
            m.model.layers[1].post_attention_layernorm.weight[5] = 0
    chosen = ["model.layers.1.mlp.up_proj", "model.layers.1.self_attn.v_proj"]
    done = []
    matrices = dict(hf.calibrate(model, random_tokens(2), mg.Recipe.named("gptq"), chosen, progress=lambda *stage: done.append(stage)))
    assert set(matrices) == set(chosen) and done == [("quantise", 1, 2), ("quantise", 2, 2)]
    assert [matrices[name].report.dead_columns for name in chosen] == [1, 0]
    for name, weight in original.state_dict().items():
        changed = name.removesuffix(".weight") in chosen
        assert torch.equal(model.state_dict()[name], weight) != changed, name


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens", "model.norm", "model.layers.0.input_layernorm", "model.layers.3.mlp.up_proj", "model.layers.0.mlp", "mlp.up_proj", "model.layers.0"])
def test_a_module_outside_the_blocks_is_refused_by_name(module):
    model, original = decoder("Llama"), decoder("Llama")
    with pytest.raises(ValueError) as refusal:
        list(hf.calibrate(model, random_tokens(1), mg.Recipe.named("rtn"), ["model.layers.0.mlp.up_proj", module]))
    assert all(word in str(refusal.value) for word in (f"{module} is not a linear layer inside model.layers.0 … model.layers.2", "ignore"))
    assert all(torch.equal(weight, original.state_dict()[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("activations", [None, "nvfp4"])
@pytest.mark.parametrize("name", ["rtn", "mr-gptq", "best"])
def test_a_layer_that_no_token_reaches_is_rounded_plainly_and_says_so(name, activations):
    """As an expert that the text never chose. Its input's scale at W4A4 is 1, not infinite."""
    model, recipe = decoder("Llama"), mg.Recipe.named(name, activations=activations)
    model.model.layers[1].mlp.unused = torch.nn.Linear(64, 64)
    weight = model.model.layers[1].mlp.unused.weight.detach().numpy().copy()
    matrices = dict(hf.calibrate(model, random_tokens(1), recipe, ["model.layers.1.mlp.unused", "model.layers.1.mlp.up_proj"]))
    q, scales = matrices["model.layers.1.mlp.unused"], {"rtn": "absmax", "mr-gptq": "fpquant_mse", "best": "mse"}[name]
    expected = mg.quantize(weight, scales=scales, rotation=mg.Hadamard(recipe.rotation) if recipe.rotation else None)
    assert np.array_equal(q.codes, expected.codes) and np.array_equal(q.scales, expected.scales) and q.report.method == "rounding"
    assert q.report.fallback == (None if name == "rtn" else f"rounded plainly, scales by {scales}: no token reached its inputs") and q.report.tokens == 0
    assert (q.activations.tensor_scale == 1) if activations else q.activations is None
    assert matrices["model.layers.1.mlp.up_proj"].report.fallback is None and matrices["model.layers.1.mlp.up_proj"].report.tokens > 0


def test_values_that_are_not_finite_are_refused_by_the_layers_name():
    for recipe in (mg.Recipe.named("gptq", "nvfp4"), mg.Recipe.named("rtn", "mxfp4")):
        model = decoder("Llama")
        model.model.layers[2].self_attn.o_proj.weight.data[3, 7] = torch.inf
        with pytest.raises(ValueError, match=r"model\.layers\.2\.self_attn\.o_proj\.weight: \w+ is inf at row 3, column 7"):
            list(hf.calibrate(model, random_tokens(1), recipe, ["model.layers.2.self_attn.o_proj"]))
        with pytest.raises(ValueError, match=r"the input of model\.layers\.2\.mlp\.gate_proj: x is nan at index \(0, 0, \d+\)"):
            list(hf.calibrate(model, random_tokens(1), recipe, ["model.layers.2.mlp.gate_proj"]))
