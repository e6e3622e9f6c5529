"""Models on packed weights: every layer against float64 products of what its checkpoint stores, and text from them."""

import copy
import gc
import importlib
import json
import pickle
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import mrgptq as mg
from mrgptq import hf
from mrgptq.cli import main
from mrgptq.hf import activations as rounding_hooks
from mrgptq.hf import linear
from mrgptq.hf.shared import SharedInput

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 160, "max_position_embeddings": 64}
PROBE = torch.randint(0, 160, (3, 24), generator=torch.Generator().manual_seed(1))
KINDS = [("compressed-tensors", "nvfp4", False, 16), ("compressed-tensors", "mxfp4", False, None), ("compressed-tensors", "mxfp4", True, None), ("compressed-tensors", "nvfp4", True, 32), ("fp_quant", "mxfp4", True, 32), ("mrgptq", "nvfp4", True, None)]


def checkpoint(folder, dialect="compressed-tensors", format="nvfp4", activations=False, rotation=None, tied=True):
    """A small Qwen2, whose q, k and v have biases, quantised and written."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**SMALL, tie_word_embeddings=tied), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    recipe = replace(mg.Recipe.named("best-online" if dialect == "mrgptq" else "rtn", format, dialect, format if activations else None), solver="rtn", scales="absmax", order="activation", rounds=0, cross=0.0, output_hessian=None, rotation=rotation)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]
    matrices = dict(hf.calibrate(model, PROBE[:2], recipe, names))
    kept = {name: value.numpy() for name, value in model.state_dict().items() if name.removesuffix(".weight") not in matrices and not (tied and name == "lm_head.weight")}
    mg.save(folder, kept | {f"{name}.weight": matrix for name, matrix in matrices.items()}, dialect, config=model.config.to_dict())
    return folder


def packed_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, hf.PackedLinear)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("dialect", "format", "activations", "rotation"), KINDS)
def test_every_layer_is_the_product_of_what_is_stored(dialect, format, activations, rotation, tied, tmp_path):
    model = hf.load_quantized(checkpoint(tmp_path / "out", dialect, format, activations, rotation, tied))
    layers, seen = packed_layers(model), {}
    assert len(layers) == 14 and sum(layer.bias is not None for layer in layers.values()) == 6
    for name, layer in layers.items():
        layer.register_forward_hook(lambda module, args, output, name=name: seen.update({name: (args[0].numpy().copy(), output.numpy().copy())}))
    with torch.no_grad():
        logits = model(input_ids=PROBE).logits
    assert logits.isfinite().all() and set(seen) == set(layers)
    for name, (x, y) in seen.items():
        layer, matrix = layers[name], layers[name].matrix.unpack()
        assert (matrix.activations is None) == (not activations)
        turned = matrix.rotation.apply(x) if rotation else x
        if activations:
            rule = matrix.activations
            turned = mg.round_activations(x, rule.format, rule=rule.rule, mx_rule=rule.mx_rule, tensor_scale=rule.tensor_scale, rotation=matrix.rotation)
        wide, values = turned.astype(np.float64), matrix.dequantize().astype(np.float64)
        bias = 0.0 if layer.bias is None else layer.bias.detach().numpy().astype(np.float64)
        # 41 float32 roundings on the way of a product at most (mg.matmul's docstring), the input's, and the bias's two.
        assert (np.abs(y - (wide @ values.T + bias)) <= 45 * 2.0**-24 * (np.abs(wide) @ np.abs(values).T + np.abs(bias))).all(), name


def test_weights_stay_packed_in_copies_files_and_states(tmp_path):
    model = hf.load_quantized(checkpoint(tmp_path / "out", activations=True))
    layers, stored = packed_layers(model), mg.load(tmp_path / "out")
    for name, layer in layers.items():
        matrix = stored[f"{name}.weight"]
        own = layer.matrix.unpack()
        assert np.array_equal(own.codes, matrix.codes) and np.array_equal(own.scales, matrix.scales) and not hasattr(layer, "weight")
        assert sum(buffer.nbytes for buffer in layer.buffers()) == mg.prepack(matrix).nbytes and all(name == "bias" for name, _ in layer.named_parameters())
    assert all(tensor.device.type == "cpu" for tensor in (*model.parameters(), *model.buffers()))
    with torch.no_grad():
        expected = model(input_ids=PROBE).logits
        other = hf.load_quantized(tmp_path / "out")
        for layer in packed_layers(other).values():
            layer.code_tiles.zero_()
        assert not torch.equal(other(input_ids=PROBE).logits, expected)
        other.load_state_dict(model.state_dict())
        for same in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to("cpu").eval()):
            assert torch.equal(same(input_ids=PROBE).logits, expected)
    assert "PackedLinear(in_features=64, out_features=96, nvfp4, inputs nvfp4, rotation=Identity(), bias=False)" in repr(model)


def test_an_input_that_layers_share_is_rounded_once_and_not_kept(tmp_path, monkeypatch):
    model = hf.load_quantized(checkpoint(tmp_path / "out", activations=True))
    calls, rounding = [], linear.quantize_activations
    monkeypatch.setattr(linear, "quantize_activations", lambda x, *args, **kwargs: calls.append(x.shape) or rounding(x, *args, **kwargs))
    with torch.no_grad():
        expected = model(input_ids=PROBE).logits
    # q, k and v; o; gate and up; down. Scales are calibrated for each set alone, so o's input is no other's.
    assert len(calls) == 2 * 4
    calls.clear()
    with torch.inference_mode():
        assert torch.equal(model(input_ids=PROBE).logits, expected) and len(calls) == 14
    calls.clear()
    q, k = (model.get_submodule(f"model.layers.0.self_attn.{name}_proj") for name in "qk")
    x = torch.randn(5, 64)
    with torch.no_grad():
        q(x), k(x)
        assert len(calls) == 1
        x[0] = 0
        assert torch.equal(k(x), k(x.clone())) and len(calls) == 3
        q(x)
    shared = q._shared
    assert shared is k._shared
    x = torch.randn(2, 64)
    q(x.detach())
    gc.collect()
    assert shared._last is None  # the tensor is gone, and what was made of it


@pytest.mark.parametrize("kind", [("compressed-tensors", "nvfp4", True, 16), ("fp_quant", "mxfp4", True, None)])
def test_a_state_brings_all_that_its_codes_mean(kind, tmp_path):
    """Into a model that another checkpoint made: other tensor scales, another rotation, inputs as they are. Codes alone would be read by those."""
    donor, other = hf.load_quantized(checkpoint(tmp_path / "a", *kind)), hf.load_quantized(checkpoint(tmp_path / "b", format=kind[1], rotation=32))
    with torch.no_grad():
        expected = donor(input_ids=PROBE).logits
        state = donor.state_dict()
        assert all(isinstance(value, torch.Tensor) for value in state.values())
        other.load_state_dict(state)
        assert torch.equal(other(input_ids=PROBE).logits, expected)
        for name, layer in packed_layers(other).items():
            own = donor.get_submodule(name).matrix
            assert (layer.matrix.rotation, layer.matrix.activations, layer.matrix.tensor_scale) == (own.rotation, own.activations, own.tensor_scale)
    turned = mg.quantize(np.random.default_rng(0).standard_normal((4, 32)), rotation=mg.Dense(np.diag([1.0, 2.0])))
    layer = hf.PackedLinear(mg.quantize(np.eye(4, 32)))
    layer.load_state_dict(hf.PackedLinear(turned).state_dict())
    assert layer.rotation == turned.rotation and np.array_equal(layer.matrix.unpack().dequantize(unrotate=True), turned.dequantize(unrotate=True))


def test_a_packed_model_runs_where_gradients_are_on_and_is_not_saved_as_what_it_is_not(tmp_path):
    model = hf.load_quantized(checkpoint(tmp_path / "out"))
    logits = model(input_ids=PROBE).logits
    with torch.no_grad():
        assert not logits.requires_grad and torch.equal(logits, model(input_ids=PROBE).logits)
    for same in (model, copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match="not saved by transformers, which knows no packed layers: copy the folder"):
            same.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_models_are_loaded_side_by_side_and_other_threads_are_left_alone(tmp_path):
    folder = checkpoint(tmp_path / "out")
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: hf.load_quantized(folder), range(8)))
        with hf.model.parameters_on_meta():
            assert torch.nn.Linear(2, 2).weight.device.type == "meta" and pool.submit(lambda: torch.nn.Linear(2, 2).weight.device.type).result() == "cpu"
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"
    with torch.no_grad():
        assert torch.equal(models[0](input_ids=PROBE).logits, models[-1](input_ids=PROBE).logits)


def test_a_layer_that_is_no_plain_linear_is_dequantised_with_a_warning(tmp_path, monkeypatch, caplog):
    class Router(torch.nn.Linear):
        """What a model may derive from a linear layer: it may do more than multiply."""

    class Auto:
        @staticmethod
        def from_config(config, dtype, **kwargs):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
            model.set_submodule("model.layers.1.mlp.down_proj", Router(96, 64, bias=False))
            return model

    folder = checkpoint(tmp_path / "out")
    whole = hf.load_quantized(folder)
    assert not caplog.records
    monkeypatch.setattr(hf.model, "AutoModelForCausalLM", Auto)
    partly = hf.load_quantized(folder)
    assert [record.message for record in caplog.records] == ["model.layers.1.mlp.down_proj is a Router and no plain Linear: its weight is dequantised"]
    assert len(packed_layers(partly)) == 13 and np.array_equal(partly.model.layers[1].mlp.down_proj.weight.detach().numpy(), whole.model.layers[1].mlp.down_proj.matrix.unpack().dequantize())


def test_an_input_is_turned_once(tmp_path, monkeypatch):
    model = hf.load_quantized(checkpoint(tmp_path / "out", rotation=16))
    calls, apply = [], mg.Hadamard.apply
    monkeypatch.setattr(mg.Hadamard, "apply", lambda self, x, **kwargs: calls.append(self) or apply(self, x, **kwargs))
    with torch.no_grad():
        expected = model(input_ids=PROBE).logits
    assert len(calls) == 2 * 4
    with torch.inference_mode():
        assert torch.equal(model(input_ids=PROBE).logits, expected) and len(calls) == 8 + 14


def test_hooks_round_a_shared_input_once_and_keep_nothing(monkeypatch):
    made, own = [], rounding_hooks.rounded
    monkeypatch.setattr(rounding_hooks, "rounded", lambda *args: made.append(own(*args)) or made[-1])
    q, k = torch.nn.Linear(32, 8), torch.nn.Linear(32, 8)
    rounding_hooks.round_inputs([q, k], mg.Activations("mxfp4"), mg.Identity())
    with torch.no_grad():
        x = torch.randn(3, 32)
        q(x), k(x)
        assert len(made) == 1
        x[0] = 1
        assert torch.equal(k(x), k(x.clone())) and len(made) == 3
        last = weakref.ref(made[-2])
        q(x)
    made.clear()
    x = None
    gc.collect()
    assert last() is None


def test_what_another_thread_rounds_meanwhile_is_not_taken_for_ones_own():
    """The comparison stands for the moment at which another thread takes over: it leaves its own input behind."""
    shared, x, y = SharedInput(), torch.ones(1), torch.ones(1)

    class How:
        def __eq__(self, other):
            shared.of(y, "another", lambda: "the other's")
            return True

    how = How()
    assert shared.of(x, how, lambda: "mine") == "mine" and shared.of(x, how, lambda: "mine, made again") == "mine"
    assert shared.of(y, "another", lambda: "made again") == "the other's"


def test_a_layer_answers_alike_for_any_number_of_threads(tmp_path):
    before = torch.get_num_threads()
    try:
        for activations, rotation in ((False, 16), (True, None)):
            layer = hf.load_quantized(checkpoint(tmp_path / f"{activations}", activations=activations, rotation=rotation)).get_submodule("model.layers.0.mlp.up_proj")
            x = torch.randn(70, 64, generator=torch.Generator().manual_seed(2))
            answers = []
            for threads in (1, 2, 3):
                hf.use_threads(threads)
                answers.append(layer(x.clone()))
            assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    finally:
        hf.use_threads(before)


def test_a_state_of_another_shape_is_refused_and_nothing_of_it_taken():
    rng = np.random.default_rng(0)
    eight, twenty = (hf.PackedLinear(mg.quantize(rng.standard_normal((rows, 32), dtype=np.float32), "nvfp4")) for rows in (8, 20))
    model, before = torch.nn.Sequential(eight), eight.matrix.unpack().codes.copy()
    with pytest.raises(RuntimeError, match="0 has 8 x 32 weights; the state is of 20 x 32"):  # a tile has room for both
        model.load_state_dict(torch.nn.Sequential(twenty).state_dict())
    assert np.array_equal(eight.matrix.unpack().codes, before)


def test_what_a_layer_takes_and_refuses(tmp_path):
    for activations in (False, True):
        layer = hf.load_quantized(checkpoint(tmp_path / f"{activations}", activations=activations)).get_submodule("model.layers.1.mlp.up_proj")
        x = torch.randn(2, 3, 64)
        with torch.no_grad():
            y = layer(x)
            assert y.shape == (2, 3, 96) and y.dtype == torch.float32 and torch.equal(layer(x.transpose(0, 1)).transpose(0, 1), y) and layer(x[:0]).shape == (0, 3, 96)
            brief = layer(x.bfloat16())
            assert brief.dtype == torch.bfloat16 and torch.equal(brief, layer(x.bfloat16().float()).bfloat16()) and layer(x.half()).dtype == torch.float16
            for wrong in (torch.randn(1, 32), torch.zeros(3, 0), torch.zeros(0, 32), torch.tensor(1.0)):
                with pytest.raises(ValueError, match=rf"input has shape {re.escape(str(tuple(wrong.shape)))}; its last dimension must be 64"):
                    layer(wrong)
            torch.set_default_dtype(torch.float64)
            try:
                assert torch.equal(layer(x), y) and layer(x).dtype == torch.float32
            finally:
                torch.set_default_dtype(torch.float32)
            with torch.device("meta"):
                assert torch.equal(layer(x), y)
            with pytest.raises(ValueError, match="not finite|nan"):
                layer(torch.full((1, 64), float("nan")))
        with pytest.raises(RuntimeError, match="has no gradient: run it under torch.no_grad"):
            layer(torch.randn(1, 64, requires_grad=True))
        with pytest.raises(RuntimeError, match="runs on the CPU; its input is on meta"):
            layer(torch.empty(1, 64, device="meta"))
        with pytest.raises(TypeError, match=r"input is torch.int64; it must be a floating-point tensor"):
            layer(torch.ones(1, 64, dtype=torch.int64))


def test_kernels_are_for_the_cpu(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path / "out")
    assert not packed_layers(hf.load_quantized(folder, kernels=False)) and len(packed_layers(hf.load_quantized(folder, kernels=True))) == 14
    monkeypatch.setattr(hf.model, "as_device", lambda device: torch.device(device))
    with pytest.raises(ValueError, match="kernels is True, device 'cuda'; the kernels run on the CPU"):
        hf.load_quantized(folder, device="cuda", kernels=True)


@pytest.fixture(scope="module")
def leaf_quantised(leaf_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "leaf"
    assert main(["quantize", str(leaf_folder), str(out), "--recipe", "rtn"]) == 0
    return out


def test_generated_text_is_that_of_transformers_own_loop(leaf_quantised):
    model, tokenizer = hf.load_quantized(leaf_quantised), hf.load_tokenizer(leaf_quantised)
    inputs, pieces = tokenizer("It was a dark night, and", return_tensors="pt"), []
    done = hf.generate(model, tokenizer, "It was a dark night, and", tokens=12, write=pieces.append)
    ids = inputs["input_ids"]
    margins = []
    with torch.no_grad():
        for _ in range(12):  # without a cache
            logits = model(input_ids=ids, use_cache=False).logits[:, -1:]
            likeliest = logits.topk(2).values[0, 0]
            margins.append(float(likeliest[0] - likeliest[1]))
            ids = torch.cat([ids, logits.argmax(-1)], 1)
    assert done.text == "".join(pieces) == tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(pieces) > 2 and done.new_tokens == 12 and done.prompt_tokens == inputs["input_ids"].shape[1] and 0 < done.prompt_seconds < done.seconds and done.tokens_per_second > 0
    # Dequantised weights give logits within some 1e-5, so a choice by more than a thousandth is the same.
    assert min(margins) > 1e-3 and hf.generate(hf.load_quantized(leaf_quantised, kernels=False), tokenizer, "It was a dark night, and", tokens=12).text == done.text
    state = torch.get_rng_state()
    drawn = [hf.generate(model, tokenizer, "It was", tokens=12, temperature=1.5, seed=seed).text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and torch.equal(torch.get_rng_state(), state)


def test_the_prompts_time_ends_with_the_first_new_token(leaf_quantised, monkeypatch):
    """By a clock that each forward pass moves on by a second: one reads the prompt and gives the first token, four give one more each."""
    model, passes = hf.load_quantized(leaf_quantised), []
    model.register_forward_hook(lambda *_: passes.append(1))
    monkeypatch.setattr(importlib.import_module("mrgptq.hf.generate"), "time", SimpleNamespace(perf_counter=lambda: float(len(passes))))
    done = hf.generate(model, hf.load_tokenizer(leaf_quantised), "It was a dark night, and", tokens=5)
    assert (done.new_tokens, done.prompt_seconds, done.seconds, done.tokens_per_second) == (5, 1.0, 5.0, 1.0)


def test_a_text_ends_where_the_models_settings_say(leaf_quantised, tmp_path):
    """generation_config.json names other ends than config.json, and beams, which cannot be streamed."""
    tokenizer = hf.load_tokenizer(leaf_quantised)
    free = hf.generate(hf.load_quantized(leaf_quantised), tokenizer, "It was a dark night, and", tokens=8)
    ids = tokenizer("It was a dark night, and" + free.text)["input_ids"][free.prompt_tokens :]
    assert len(ids) == 8 and ids[2] not in ids[:2]
    for path in leaf_quantised.iterdir():
        (tmp_path / path.name).hardlink_to(path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, ids[2]], "num_beams": 4, "do_sample": True, "top_k": 5, "temperature": 0.7}))
    done = hf.generate(hf.load_quantized(tmp_path), tokenizer, "It was a dark night, and", tokens=8)
    assert done.new_tokens == 3 and free.text.startswith(done.text) and done.text == tokenizer.decode(ids[:3])


def test_nothing_but_the_temperature_bends_a_drawing(leaf_quantised, tmp_path):
    tokenizer, prompt = hf.load_tokenizer(leaf_quantised), "It was a dark night, and"
    plain = hf.generate(hf.load_quantized(leaf_quantised), tokenizer, prompt, tokens=12, temperature=3.0, seed=1)
    for path in leaf_quantised.iterdir():
        (tmp_path / path.name).hardlink_to(path)
    bent = {"top_k": 1, "top_p": 0.01, "min_p": 0.99, "typical_p": 0.01, "epsilon_cutoff": 0.5, "eta_cutoff": 0.5}
    for said in ({name: value} for name, value in bent.items()):
        (tmp_path / "generation_config.json").unlink()
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "do_sample": True, "return_dict_in_generate": True} | said))
        assert hf.generate(hf.load_quantized(tmp_path), tokenizer, prompt, tokens=12, temperature=3.0, seed=1).text == plain.text, said
    greedy = hf.generate(hf.load_quantized(leaf_quantised), tokenizer, prompt, tokens=8)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "stop_strings": [greedy.text[:6]]}))
    assert hf.generate(hf.load_quantized(tmp_path), tokenizer, prompt, tokens=8).new_tokens < 8


@pytest.mark.parametrize(("options", "message"), [({"tokens": 2.5}, "tokens is 2.5; it must be a whole number"), ({"tokens": True}, "tokens is True"), ({"seed": 1.5}, "seed is 1.5")])
def test_numbers_of_tokens_are_whole(options, message, leaf_quantised):
    with pytest.raises(TypeError, match=message):
        hf.generate(hf.load_quantized(leaf_quantised), hf.load_tokenizer(leaf_quantised), "It", **options)


@pytest.mark.parametrize(("prompt", "options", "message"), [("", {}, "the prompt is empty"), ("It", {"tokens": 0}, "tokens is 0; it must be 1 or more"), ("It", {"temperature": -1.0}, "temperature is -1.0"), ("It", {"temperature": 1e-40}, "it must be 0 or a finite number from 1e-6 on"), ("It", {"temperature": float("nan")}, "temperature is nan"), ("It", {"temperature": 1.0, "seed": 2**64}, "seed is 18446744073709551616; it must be from 0"), ("It", {"tokens": 10**6}, "longer than the model's")])
def test_generation_is_refused_with_a_sentence(prompt, options, message, leaf_quantised):
    with pytest.raises(ValueError, match=message):
        hf.generate(hf.load_quantized(leaf_quantised), hf.load_tokenizer(leaf_quantised), prompt, **options)


def test_the_command_streams_text_and_says_how_fast(leaf_quantised, leaf_folder, capsys):
    model, tokenizer = hf.load_quantized(leaf_quantised), hf.load_tokenizer(leaf_quantised)
    expected = hf.generate(model, tokenizer, "It was a dark night, and", tokens=8).text
    assert main(["generate", str(leaf_quantised), "It was a dark night, and", "--tokens", "8"]) == 0
    told = capsys.readouterr()
    assert told.out == expected + "\n" and "8 written" in told.err and "a second" in told.err
    assert main(["generate", str(leaf_folder), "It was", "--tokens", "2"]) == main(["generate", str(leaf_quantised), "It was", "--tokens", "2", "--no-kernels"]) == 0
    capsys.readouterr()
    assert main(["generate", str(leaf_quantised), ""]) == 1
    assert "mrgptq: the prompt is empty" in capsys.readouterr().err


def test_an_interrupt_leaves_the_text_that_came(leaf_quantised, monkeypatch, capsys):
    def stop(model, tokenizer, prompt, *, write, **options):
        write("so far")
        raise KeyboardInterrupt

    monkeypatch.setattr(hf, "generate", stop)
    assert main(["generate", str(leaf_quantised), "It"]) == 130
    assert capsys.readouterr() == ("so far\n", "mrgptq: interrupted\n")
