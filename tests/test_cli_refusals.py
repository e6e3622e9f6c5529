"""What the command line refuses: status 1, one sentence on stderr, and nothing is left."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from mrgptq import cli

CALIBRATION = str(Path(__file__).resolve().parent.parent / "examples" / "text" / "calibration.txt")


def damaged(leaf_folder, tmp_path, name, change):
    """A copy of leaf with one file changed."""
    shutil.copytree(leaf_folder, tmp_path / "model")
    change(tmp_path / "model" / name)
    return tmp_path / "model"


def text_file(tmp_path, content):
    (tmp_path / "text.txt").write_bytes(content)
    return tmp_path / "text.txt"


def odd_columns(folder):
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    safetensors.numpy.save_file({"model.layers.0.w.weight": np.ones((4, 100), np.float32)}, folder / "model.safetensors")
    return folder


REFUSED = {
    "no calibration": (lambda leaf, tmp: [leaf, tmp / "out"], ["needs a calibration text", "solver"]),
    "gptq without": (lambda leaf, tmp: [leaf, tmp / "out", "--recipe", "gptq", "--format", "mxfp4"], ["needs a calibration text"]),
    "W4A4 NVFP4 without": (lambda leaf, tmp: [leaf, tmp / "out", "--recipe", "rtn", "--activations", "nvfp4"], ["needs a calibration text", "W4A4 NVFP4"]),
    "best without": (lambda leaf, tmp: [leaf, tmp / "out", "--recipe", "best", "--format", "mxfp4"], ["needs a calibration text"]),
    "searched activations in compressed-tensors": (lambda leaf, tmp: [leaf, tmp / "out", "--recipe", "best-online", "--activations", "nvfp4", "--calibration", CALIBRATION, "--dialect", "compressed-tensors"], ["compressed-tensors", '"absmax"', '"mse"', 'the dialect "mrgptq"']),
    "cross beyond": (lambda leaf, tmp: [leaf, tmp / "out", "--calibration", CALIBRATION, "--cross", "1.5"], ["cross is 1.5; it must be from 0 to 1"]),
    "cross of rounding": (lambda leaf, tmp: [leaf, tmp / "out", "--recipe", "rtn", "--cross", "0.5"], ['cross 0.5 needs the solver "gptq"']),
    "out exists": (lambda leaf, tmp: [leaf, tmp, "--recipe", "rtn"], ["exists already", "never overwritten"]),
    "out's parent": (lambda leaf, tmp: [leaf, tmp / "a" / "out", "--recipe", "rtn"], ["the folder", "does not exist"]),
    "no model": (lambda leaf, tmp: [tmp / "nowhere", tmp / "out", "--recipe", "rtn"], ["no checkpoint at", "nowhere"]),
    "truncated": (lambda leaf, tmp: [damaged(leaf, tmp, "model.safetensors", lambda f: os.truncate(f, 10**6)), tmp / "out", "--recipe", "rtn"], ["model.safetensors", "truncated"]),
    "no weights": (lambda leaf, tmp: [damaged(leaf, tmp, "model.safetensors", os.remove), tmp / "out", "--recipe", "rtn"], ["no safetensors file"]),
    "no tokenizer": (lambda leaf, tmp: [damaged(leaf, tmp, "tokenizer.json", os.remove), tmp / "out", "--calibration", CALIBRATION], ["no tokenizer"]),
    "no text": (lambda leaf, tmp: [leaf, tmp / "out", "--calibration", tmp / "none.txt"], ["No such file", "none.txt"]),
    "not UTF-8": (lambda leaf, tmp: [leaf, tmp / "out", "--calibration", text_file(tmp, b"caf\xe9 au lait")], ["text.txt is not UTF-8 text"]),
    "no folder for it": (lambda leaf, tmp: [leaf, tmp / "a" / "out", "--recipe", "rtn", "--dry-run"], ["a/out cannot be made", "does not exist"]),
    "no such text": (lambda leaf, tmp: [leaf, tmp / "out", "--calibration", tmp / "none.txt"], ["the text", "none.txt cannot be read"]),
    "short text": (lambda leaf, tmp: [leaf, tmp / "out", "--calibration", text_file(tmp, b"once"), "--tokens", 512], ["the text has", "one window needs 512"]),
    "other format": (lambda leaf, tmp: [leaf, tmp / "out", "--recipe", "rtn", "--activations", "mxfp4"], ["activations for nvfp4", "'mxfp4'"]),
    "rotation 12": (lambda leaf, tmp: [leaf, tmp / "out", "--recipe", "rtn", "--rotation", 12], ["block_size is 12", "power of two"]),
    "padding": (lambda leaf, tmp: [odd_columns(tmp / "model"), tmp / "out", "--recipe", "rtn"], ["w.weight has 100 columns", "nvfp4 needs a multiple of 16", "--pad"]),
    "padding that no loader knows": (lambda leaf, tmp: [odd_columns(tmp / "model"), tmp / "out", "--recipe", "rtn", "--pad"], ["model.layers.0.w has 12 columns of zeros", "compressed-tensors", '"mrgptq"']),
    "fp_quant W4A16": (lambda leaf, tmp: [leaf, tmp / "out", "--recipe", "rtn", "--dialect", "fp_quant"], ["fp_quant", "W4A4", "W4A16"]),
    "bad pattern": (lambda leaf, tmp: [leaf, tmp / "out", "--recipe", "rtn", "--ignore", "("], ["ignore", "'('", "regular expression"]),
    "lm_head": (lambda leaf, tmp: [leaf, tmp / "out", "--calibration", CALIBRATION, "--targets", "embed", "--tokens", 512], ["model.embed_tokens is not a linear layer inside model.layers.0"]),
    "device": (lambda leaf, tmp: [leaf, tmp / "out", "--calibration", CALIBRATION, "--device", "cuda:7"], ["device is 'cuda:7'", "torch cannot use"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_status_1_and_one_sentence_on_stderr_and_nothing_is_left(case, run, leaf_folder, tmp_path):
    build, words = REFUSED[case]
    arguments = build(leaf_folder, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run("quantize", *arguments)
    assert status == 1 and out == ""
    last = err.splitlines()[-1]
    assert last.startswith("mrgptq: ") and all(word in last for word in words) and "Errno" not in err, err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "asked", "words"),
    [
        ("model.safetensors", "os.open", "could not read {model}/model.safetensors: Permission denied"),
        ("config.json", "os.open", "could not read {model}/config.json: Permission denied"),
        ("model", "pathlib.Path.iterdir", "{model} cannot be used: Permission denied"),
        (".out.partial", "pathlib.Path.mkdir", "could not write {out}/.out.partial: Permission denied"),
    ],
)
def test_what_the_system_refuses_is_a_sentence_with_the_file(name, asked, words, run, leaf_folder, tmp_path, monkeypatch):
    """As it does to a user who may not read a file; whoever runs the tests may be root, who may."""
    model = shutil.copytree(leaf_folder, tmp_path / "model")
    owner, _, function = asked.rpartition(".")
    real = getattr({"os": os, "pathlib.Path": Path}[owner], function)

    def refuse(path, *arguments, **more):
        if os.path.basename(path) == name:
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path, *arguments, **more)

    monkeypatch.setattr(asked, refuse)
    status, out, err = run("quantize", model, tmp_path / "out", "--recipe", "rtn")
    assert (status, out) == (1, "") and err.splitlines()[-1] == "mrgptq: " + words.format(model=model, out=tmp_path)


def test_a_shard_that_vanishes_while_the_command_runs_is_named_and_nothing_is_promised(run, leaf_folder, tmp_path, monkeypatch):
    model = shutil.copytree(leaf_folder, tmp_path / "model")
    monkeypatch.setattr(cli._Progress, "__call__", lambda self, stage, done, total: done == 5 and (model / "model.safetensors").unlink())
    status, out, err = run("quantize", model, tmp_path / "out", "--recipe", "rtn")
    said = err.splitlines()[-2:]
    assert (status, out) == (1, "") and str(model) in said[0] and "Errno" not in err
    assert said[1].startswith(f"mrgptq: what is done is kept in {tmp_path / '.out.partial'}, but the run's inputs cannot be read any more") and "goes on" not in err
