"""What several files share: the model leaf with its weights, and the inputs that its linear layers see on the calibration text."""

import os
from dataclasses import dataclass
from pathlib import Path

# Read by OpenMP and by NumPy's OpenBLAS when they are loaded, so set before the imports below. The threads of both otherwise spin while they wait, and where other processes keep the
# cores busy a loop of microseconds then waits for a time slice: up to fifty times slower, measured.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest

from forked import Forks

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
WINDOWS, SEQUENCE = 16, 128  # 2048 tokens: more than five times the widest layer's columns, so no Hessian is singular for want of tokens


@dataclass(frozen=True)
class Leaf:
    """weights: {layer: (rows, cols) float32}; inputs: {layer: (tokens, cols) float32}; hessians: {layer: (cols, cols) float64, X^T X / tokens summed by NumPy}."""

    folder: Path
    weights: dict
    inputs: dict
    hessians: dict


@pytest.fixture(scope="session")
def leaf_folder():
    return EXAMPLES / "models" / "leaf"


@pytest.fixture(scope="session")
def calibration_text():
    return (EXAMPLES / "text" / "calibration.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def leaf(leaf_folder, calibration_text):
    """Leaf's 28 linear layers, run once by transformers with hooks that note each layer's input."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(leaf_folder, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(leaf_folder)(calibration_text[: 16 * WINDOWS * SEQUENCE], add_special_tokens=False)["input_ids"]
    assert len(tokens) >= WINDOWS * SEQUENCE
    layers = {name: module for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(layers) == 28
    inputs, hessians, last = {}, {}, (None, None)

    def note(name):
        def hook(module, args):
            inputs[name] = args[0].reshape(-1, module.in_features).numpy()

        return hook

    handles = [module.register_forward_pre_hook(note(name)) for name, module in layers.items()]
    with torch.no_grad():
        model(input_ids=torch.tensor(tokens[: WINDOWS * SEQUENCE]).reshape(WINDOWS, SEQUENCE), use_cache=False)
    for handle in handles:
        handle.remove()
    for name, x in inputs.items():
        if last[0] is None or not np.array_equal(last[0], x):  # q, k and v read one input, and so do gate and up
            wide = x.astype(np.float64)
            last = (x, wide.T @ wide / len(x))
        inputs[name], hessians[name] = last
    weights = {name: module.weight.detach().numpy().copy() for name, module in layers.items()}
    for array in (*weights.values(), *inputs.values(), *hessians.values()):
        array.flags.writeable = False  # shared by the whole session, so nobody may change them
    return Leaf(leaf_folder, weights, inputs, hessians)


@pytest.fixture(scope="session")
def stored_hessians(tmp_path_factory, leaf_folder, calibration_text):
    """A folder with the Hessians of leaf's layers on 500 tokens."""
    import mrgptq as mg
    from mrgptq import hf

    names = [name.removesuffix(".weight") for name in mg.load(leaf_folder) if "_proj" in name]
    folder = tmp_path_factory.mktemp("hessians") / "stored"
    mg.save_hessians(folder, hf.collect_hessians(hf.load_model(leaf_folder), hf.token_windows(hf.load_tokenizer(leaf_folder), calibration_text, 5, 100), names))
    return folder


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Processes that need not import torch first."""
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.end()


@pytest.fixture
def run(capsys):
    """Run the command line here: (exit status, stdout, stderr)."""
    from mrgptq import cli

    def call(*arguments):
        capsys.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return call
