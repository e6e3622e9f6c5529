"""Models that somebody made to do harm, or that fit nothing: transformers is handed none of their code, kernels or pickles, and what it cannot use is refused by folder."""

import json
import os
import shutil

import numpy as np
import pytest
import safetensors.numpy
import torch

from refusals import refusal

import mrgptq as mg
from mrgptq import cli, hf

INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(leaf_folder, tmp_path):
    """A copy of leaf that a program lies beside, and the file that it would leave if it ran."""
    copied, trace = tmp_path / "model", tmp_path / "trace"
    shutil.copytree(leaf_folder, copied)
    program = f"open({str(trace)!r}, 'w')\nfrom transformers import PretrainedConfig, PreTrainedModel\nclass C(PretrainedConfig): model_type = 'evil'\nclass M(PreTrainedModel): pass\nclass T: pass\n"
    (copied / "evil.py").write_text(program)
    return copied, trace


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


LOADERS = [hf.load_model, hf.load_quantized, hf.load_tokenizer]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("model_type", ["llama", "evil", "clip_text_model"])
def test_code_beside_a_model_is_not_run_even_if_somebody_would_say_yes(model, load, model_type, monkeypatch):
    folder, trace = model
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
    change(folder / "config.json", model_type=model_type, auto_map=auto)
    change(folder / "tokenizer_config.json", auto_map=auto, tokenizer_class="T")
    try:
        load(folder)
    except (ValueError, FileNotFoundError) as refused:
        assert str(folder) in str(refused)
    assert not trace.exists()


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"attn_implementation": "evil/kernel"}, "attn_implementation 'evil/kernel', which is code from elsewhere"),
        ({"_attn_implementation": {"": "evil/kernel"}}, "_attn_implementation {'': 'evil/kernel'}, which is code from elsewhere"),
        ({"text_config": {"experts_implementation": "evil/kernel"}}, "experts_implementation 'evil/kernel', which is code from elsewhere"),
        ({"transformers_weights": "adapter_model.bin"}, "names its weights by transformers_weights; only model.safetensors"),
        ({"num_labels": 10**9}, "config.json has num_labels 1000000000, for each of which transformers would make an entry"),
        ({"architectures": ["\ud800"]}, "config.json is not JSON in UTF-8 without repeated keys: it has a lone surrogate"),
        ({"quantization_config": [1]}, "config.json has quantization_config [1]; it must be a table"),
    ],
)
def test_settings_that_lead_elsewhere_are_refused(model, load, settings, words):
    folder, _ = model
    change(folder / "config.json", **settings)
    assert str(folder) in (message := refusal(lambda: load(folder))) and words in message


@pytest.mark.parametrize("load", LOADERS[:2])
@pytest.mark.parametrize("settings", [{"hidden_size": "abc"}, {"hidden_size": 256}, {"num_hidden_layers": 5}, {"num_attention_heads": 0}, {"vocab_size": 10**30}, {"model_type": [1]}, {"model_type": None}, {"hidden_act": "eval"}, {"id2label": 3}, {"text_config": {"model_type": "llama"}}])
def test_settings_that_make_no_model_are_refused(model, load, settings):
    folder, _ = model
    change(folder / "config.json", **settings)
    assert str(folder) in refusal(lambda: load(folder))


def test_pickles_are_not_read(model):
    folder, trace = model

    class Program:
        def __reduce__(self):
            return open, (str(trace), "w")

    torch.save({"model.norm.weight": Program()}, folder / "pytorch_model.bin")
    hf.load_model(folder)
    (folder / "model.safetensors").unlink()
    for load in LOADERS[:2]:
        assert "pytorch_model.bin" in (message := refusal(lambda load=load: load(folder), FileNotFoundError)) and "are not read" in message
    assert not trace.exists()


def test_models_from_elsewhere_and_large_side_files_are_refused(model, tmp_path):
    folder, _ = model
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}))
    assert "places tensor 'model.norm.weight' in '../elsewhere.safetensors'" in refusal(lambda: hf.load_model(folder))
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    assert "outside its folder" in refusal(lambda: hf.load_model(folder))
    for name in ("tokenizer.json", "generation_config.json", "config.json"):
        before = (folder / name).read_bytes()
        os.truncate(folder / name, 64_000_001)
        for load in LOADERS:
            assert f"{folder / name} has 64000001 bytes; at most 64000000 are read" == refusal(lambda load=load: load(folder))
        (folder / name).write_bytes(before)
    (folder / "config.json").write_text("{" * 5000)
    assert cli.main(["evaluate", str(folder), "--text", str(folder / "evil.py")]) == 1


@pytest.mark.parametrize("number", ["²", "9" * 5000], ids=["superscript", "long"])
def test_blocks_of_no_number_are_no_blocks(number, model, tmp_path, capsys):
    """A name that has a place in no model: refused, in a sentence that names the folder."""
    folder, _ = model
    tensors = {name: np.asarray(value, dtype=np.float32) for name, value in mg.load(folder).items()} | {f"model.layers.0.layers.{number}.x.weight": np.ones((4, 32), np.float32)}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (tmp_path / "text.txt").write_text("once upon a time " * 400)
    assert cli.main(["quantize", str(folder), str(tmp_path / "out"), "--recipe", "gptq", "--tokens", "64", "--sequence", "64", "--calibration", str(tmp_path / "text.txt")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"mrgptq: {folder} has no model that transformers can load") or "is not a linear layer inside model.layers.0" in last


def test_a_part_of_a_quantised_layer_beside_the_original_is_refused_at_the_door(model, tmp_path, capsys):
    folder, _ = model
    name = "model.layers.0.mlp.up_proj.weight_scale"
    safetensors.numpy.save_file({key: np.asarray(value, dtype=np.float32) for key, value in mg.load(folder).items()} | {name: np.ones((2, 2), np.float32)}, folder / "model.safetensors")
    assert cli.main(["quantize", str(folder), str(tmp_path / "out"), "--recipe", "rtn", "--dry-run"]) == 1
    assert f"has a tensor {name!r}, which is what compressed-tensors calls a part of 'model.layers.0.mlp.up_proj'" in capsys.readouterr().err
