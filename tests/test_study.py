"""Accuracy measured by recipe: the numbers against transformers' loss and the checkpoints' own reports, the table that holds them and the picture made of them."""

import json
import math
import struct
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mrgptq as mg
from mrgptq import hf
from mrgptq.study.accuracy import AccuracyRow, as_json, measure, table
from mrgptq.study.plots import accuracy_chart

RECIPES = [("rtn", mg.Recipe.named("rtn", "nvfp4")), ("mr-gptq", mg.Recipe.named("mr-gptq", "mxfp4", activations="mxfp4"))]
SIZES = {"windows": 3, "test_windows": 4, "sequence": 64}


@pytest.fixture(scope="module")
def held_out_text(leaf_folder):
    return (leaf_folder.parent.parent / "text" / "test.txt").read_text(encoding="utf-8")


def test_rows_are_the_measurements(leaf_folder, calibration_text, held_out_text):
    stages = []
    original, *rows = measure(leaf_folder, calibration_text, held_out_text, RECIPES, **SIZES, progress=stages.append)
    assert stages == ["original", "rtn, nvfp4, W4A16", "mr-gptq, mxfp4, W4A4"]

    ids = torch.tensor(AutoTokenizer.from_pretrained(leaf_folder)(held_out_text, add_special_tokens=False)["input_ids"])
    windows = [ids[None, 64 * i : 64 * i + 65] for i in range(4)]

    def perplexity(model):
        with torch.no_grad():
            return math.exp(np.mean([model(input_ids=window, labels=window).loss.item() for window in windows]))

    model = AutoModelForCausalLM.from_pretrained(leaf_folder, dtype=torch.float32).eval()
    # float32 logits of another batch size differ in their last bits, by some 1e-6
    assert (original.format, original.relative_error) == (None, None) and original.perplexity == pytest.approx(perplexity(model), rel=1e-5)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]
    inputs = hf.token_windows(hf.load_tokenizer(leaf_folder), calibration_text, 3, 64)
    for row, (label, recipe) in zip(rows, RECIPES, strict=True):
        assert (row.recipe, row.format, row.activations, row.rotation, row.mx_rule) == (label, recipe.format, recipe.activations, recipe.rotation, "even" if recipe.format == "mxfp4" else None)
        model = hf.load_model(leaf_folder)
        errors = [matrix.report.relative_error for _, matrix in hf.calibrate(model, inputs, recipe, names)]
        assert len(errors) == 28 and row.relative_error == pytest.approx(np.mean(errors), rel=1e-12)
        assert row.perplexity == pytest.approx(perplexity(model), rel=1e-5) and row.perplexity > original.perplexity
    assert json.loads(json.dumps(as_json([original, *rows])))[2]["perplexity"] == rows[1].perplexity


def test_texts_and_sets_are_told_apart(leaf_folder, calibration_text, held_out_text):
    """Each figure is of its own text, and a set is what it says it passes over."""
    far, label = calibration_text[len(calibration_text) // 2 :], "gptq"
    recipe = mg.Recipe.named(label, "mxfp4")
    first, row = measure(leaf_folder, calibration_text, held_out_text, [(label, recipe)], windows=2, skip=3, test_windows=4, sequence=64, far=far, divergence=True)

    tokenizer, model, original = hf.load_tokenizer(leaf_folder), hf.load_model(leaf_folder), hf.load_model(leaf_folder)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]
    errors = [matrix.report.relative_error for _, matrix in hf.calibrate(model, hf.token_windows(tokenizer, calibration_text, 5, 64)[3:], recipe, names)]
    assert row.relative_error == pytest.approx(np.mean(errors), rel=1e-12)
    figures = []
    for text, windows in ((held_out_text, 4), (far, 2)):
        test = hf.token_windows(tokenizer, text, windows, 64, targets=True)
        figures += [hf.perplexity(model, *test), hf.divergence(model, original, test[0])]
    assert [row.perplexity, row.divergence, row.far_perplexity, row.far_divergence] == pytest.approx(figures, rel=1e-9)
    assert len({f"{figure:.3g}" for figure in figures}) == 4

    def losses(model, temperature):
        inputs, targets = hf.token_windows(tokenizer, far, 2, 64, targets=True)
        with torch.no_grad():
            return -torch.log_softmax(model(inputs).logits.double() / temperature, -1).gather(-1, targets[..., None]).mean().item()

    temperatures = [1 + i / 10 for i in range(21)]
    best = min(temperatures, key=lambda t: losses(original, t))
    assert 1 < best < 3, "else the next lines say nothing"
    assert [first.far_tempered, row.far_tempered] == pytest.approx([np.exp(losses(original, best)), np.exp(losses(model, best))], rel=1e-5)  # float32 against float64 softmax
    assert row.far_tempered < row.far_perplexity


ROWS = [
    AccuracyRow("original", None, None, None, None, None, 30.75849),
    AccuracyRow("rtn", "nvfp4", None, None, None, 0.0123456, 33.1),
    AccuracyRow("rtn", "nvfp4", "nvfp4", None, None, 0.0123456, 35.25),
    AccuracyRow("gptq", "nvfp4", None, None, None, 0.00456, 32.0),
    AccuracyRow("gptq", "nvfp4", "nvfp4", None, None, 0.00456, 34.0),
    AccuracyRow("mr-gptq", "mxfp4", None, 32, "even", 0.0067, 31.9),
    AccuracyRow("mr-gptq", "mxfp4", "mxfp4", 32, "even", 0.0067, 33.8),
    AccuracyRow("mr-gptq", "mxfp4", "mxfp4", 128, "four-thirds", 0.0066, 33.4),
]


def test_the_table_holds_every_number_once():
    """One line for a method, W4A16 and W4A4 side by side; what was not measured is a dash."""
    header, *lines = (line.split() for line in table(ROWS).splitlines())
    assert " ".join(header) == "method format rotation layer error W4A16 ppl W4A4 ppl"
    assert lines == [
        ["original", "–", "–", "–", "30.758", "30.758"],
        ["rtn", "NVFP4", "–", "1.23e-02", "33.100", "35.250"],
        ["gptq", "NVFP4", "–", "4.56e-03", "32.000", "34.000"],
        ["mr-gptq", "MXFP4", "even", "Hadamard", "32", "6.70e-03", "31.900", "33.800"],
        ["mr-gptq", "MXFP4", "four-thirds", "Hadamard", "128", "6.60e-03", "–", "33.400"],
    ]


def test_the_picture_is_a_picture_and_shows_the_numbers(tmp_path):
    accuracy_chart(ROWS[:7], tmp_path / "accuracy.png", title="leaf")
    content = (tmp_path / "accuracy.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[12:16] == b"IHDR"
    width, height = struct.unpack(">II", content[16:24])
    assert width > 1000 and height > 400 and len(content) > 10_000
    accuracy_chart(ROWS[:7], tmp_path / "accuracy.svg", title="leaf & <others>")
    comments = " ".join(node.text or "" for node in ElementTree.parse(tmp_path / "accuracy.svg", ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))).iter())
    # matplotlib draws text as outlines and says in a comment what it draws.
    for word in ("33.10", "35.25", "32.00", "34.00", "31.90", "33.80", "original 30.76", "W4A16", "W4A4", "NVFP4", "MXFP4", "RTN", "GPTQ", "MR-GPTQ", "perplexity (lower is better)", "leaf"):
        assert word in comments, word


def test_rows_may_be_of_one_format_and_one_kind_only(tmp_path):
    accuracy_chart(ROWS[:2], tmp_path / "one.png", title="one")
    assert (tmp_path / "one.png").stat().st_size > 5000
    assert table(ROWS[:1]).splitlines()[1].split() == ["original", "–", "–", "–", "30.758", "30.758"]
    assert table([ROWS[0], replace(ROWS[1], activations="nvfp4")]).splitlines()[2].split()[-2:] == ["–", "33.100"]
