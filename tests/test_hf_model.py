"""Perplexity, token windows and running a quantised checkpoint, against transformers' own loss, tokenizer and models."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch
import transformers

import mrgptq as mg
from mrgptq import hf

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 160, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def leaf_tokenizer(leaf_folder):
    return hf.load_tokenizer(leaf_folder)


def test_perplexity_is_exp_of_the_loss_that_transformers_computes(leaf_folder, leaf_tokenizer, calibration_text, monkeypatch):
    inputs, targets = hf.token_windows(leaf_tokenizer, calibration_text, 7, 64, targets=True)
    model = hf.load_model(leaf_folder)
    assert model.dtype == torch.float32 and not model.training
    with torch.no_grad():
        # transformers shifts the labels itself: one more token gives as many predictions.
        windows = torch.cat([inputs, targets[:, -1:]], 1)
        expected = math.exp(np.mean([model(input_ids=window[None], labels=window[None]).loss.item() for window in windows]))
    done = []
    monkeypatch.setattr(hf.evaluate, "_LOGITS", 3 * 64 * 1024)  # three windows of logits at a time
    # float32 logits of another batch size: their last bits differ, by some 1e-6, and 448 of them average out
    assert hf.perplexity(model, inputs, targets, progress=done.append) == pytest.approx(expected, rel=1e-5)
    assert done == [3, 3, 1] and 2 < expected < 200


def test_token_windows_follow_each_other_in_the_text(leaf_tokenizer, calibration_text):
    text = calibration_text[:30_000]
    ids = torch.tensor(leaf_tokenizer(text, add_special_tokens=False)["input_ids"])
    assert ids[0] != leaf_tokenizer.bos_token_id
    for windows, sequence in ((1, 1), (5, 33), (3, 512)):
        used = ids[: windows * sequence]
        assert torch.equal(hf.token_windows(leaf_tokenizer, text, windows, sequence).flatten(), used)
        inputs, targets = hf.token_windows(leaf_tokenizer, text, windows, sequence, targets=True)
        assert torch.equal(inputs.flatten(), used) and torch.equal(targets.flatten(), ids[1 : windows * sequence + 1]) and inputs.shape == targets.shape == (windows, sequence)
    everything = hf.token_windows(leaf_tokenizer, text, 10**6, 100)
    assert torch.equal(everything.flatten(), ids[: len(ids) // 100 * 100])


@pytest.mark.parametrize("first", ["a" * 10, "b" * 3000])
def test_a_long_text_is_cut_without_harm_to_the_words(first):
    """Only the beginning of a text is tokenised. Here every word is a token, a cut one would be another, and a BOS would shift them all."""
    words = [first, *(f"word{i:03d}" for i in range(200))]  # 8 characters a token, as a guess from the length would have it, but for the first
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[BOS]", *words])}
    words_of = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words_of.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words_of.post_processor = tokenizers.processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words_of)
    assert tokenizer(first)["input_ids"] == [1, 2]
    for windows, sequence in ((1, 5), (4, 10), (5, 40)):
        assert hf.token_windows(tokenizer, " ".join(words), windows, sequence).flatten().tolist() == list(range(2, 2 + windows * sequence))


@pytest.mark.parametrize(("targets", "needed"), [(False, 100), (True, 101)])
def test_a_text_that_is_too_short_is_refused_with_both_numbers(targets, needed, leaf_tokenizer):
    text = "the quick brown fox"
    count = len(leaf_tokenizer(text, add_special_tokens=False)["input_ids"])
    with pytest.raises(ValueError, match=f"text has {count} tokens; one window needs {needed}"):
        hf.token_windows(leaf_tokenizer, text, 1, 100, targets=targets)
    assert hf.token_windows(leaf_tokenizer, text, 1, count).shape == (1, count)
    with pytest.raises(ValueError, match=f"one window needs {count + 1}"):
        hf.token_windows(leaf_tokenizer, text, 1, count, targets=True)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("dialect", "format", "activations", "rotation"), [("compressed-tensors", "nvfp4", False, 16), ("compressed-tensors", "mxfp4", True, None), ("compressed-tensors", "nvfp4", True, 32), ("fp_quant", "mxfp4", True, 32), ("fp_quant", "nvfp4", True, None)])
def test_a_checkpoint_runs_as_the_dense_model_of_its_values(dialect, format, activations, rotation, tied, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**SMALL, tie_word_embeddings=tied), dtype=torch.float32).eval()
    recipe = replace(mg.Recipe.named("rtn", format, dialect, format if activations else None), rotation=rotation)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]
    probe = torch.randint(0, 160, (3, 24), generator=torch.Generator().manual_seed(1))
    matrices = dict(hf.calibrate(model, probe[:2], recipe, names))
    assert len(matrices) == 14
    kept = {name: value.numpy() for name, value in model.state_dict().items() if name.removesuffix(".weight") not in matrices and not (tied and name == "lm_head.weight")}
    mg.save(tmp_path / "out", kept | {f"{name}.weight": matrix for name, matrix in matrices.items()}, dialect, config=model.config.to_dict())
    loaded = hf.load_quantized(tmp_path / "out", kernels=False)
    with torch.no_grad():
        got = loaded(input_ids=probe).logits
        assert got.dtype == torch.float32 and torch.equal(got, model(input_ids=probe).logits)
        if not activations:  # with rounded inputs a last bit may decide a code: tests/test_packed.py goes layer by layer
            packed = hf.load_quantized(tmp_path / "out")(input_ids=probe).logits
            assert (packed - got).abs().max() < 1e-4 * got.std()  # a hundred sums of float32 products that differ in their order, in two blocks


def test_what_is_no_model_is_refused_by_its_folder(leaf_folder, tmp_path):
    for load in (hf.load_model, hf.load_quantized, hf.load_tokenizer):
        with pytest.raises(FileNotFoundError, match=f"{tmp_path} is not a model folder: there is no config.json"):
            load(tmp_path)
    shutil.copy(leaf_folder / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no tokenizer"):
        hf.load_tokenizer(tmp_path)
    mg.save(tmp_path / "q", {"model.layers.0.self_attn.q_proj.weight": mg.quantize(np.eye(128))}, config=transformers.AutoConfig.from_pretrained(leaf_folder).to_dict())
    with pytest.raises(ValueError, match="q is quantised already, by 'compressed-tensors'"):
        hf.load_model(tmp_path / "q")
    with pytest.raises(ValueError, match=r"q does not fit its config.json: missing .*model\.embed_tokens"):
        hf.load_quantized(tmp_path / "q")


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_there_is_refused(device, leaf_folder):
    with pytest.raises(ValueError, match=f"device is '{device}', which torch cannot use here"):
        hf.load_model(leaf_folder, device=device)


def test_a_device_without_numbers_is_refused(leaf_folder):
    with pytest.raises(ValueError, match="device is 'meta', which holds shapes and no numbers"):
        hf.load_model(leaf_folder, device="meta")
