"""What a result, a report and a recipe show of themselves: the facts, aligned in a terminal, well-formed and escaped in a notebook, never the data."""

from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

import mrgptq as mg
from mrgptq.display import align, format_bytes, format_number


def quantized(recipe="mr-gptq", format="nvfp4", rows=48, **keywords):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 128)).astype(np.float32)
    x[:, 7] = 0
    h = mg.Hessian(128)
    h.update(x)
    return mg.quantize_layer(rng.standard_normal((rows, 128)).astype(np.float32), h, mg.Recipe.named(recipe, format), **keywords)


REPORT = mg.LayerReport(
    method="rounding", format="mxfp4", rows=48, cols=128, scales="absmax, even", weight_error=0.0123456, relative_error=None, damping=1.0, damping_asked=0.01, dead_columns=3,
    fallback="<b>not</b> factorised & 'rounded'", rounded_error=0.07654321, damped_errors=(0.0345678, 0.0234567, 0.0212345), scale_offsets={-10: 3, -1: 50, 0: 1246, 2: 700, 7: 1}, cross=0.75,
    tokens=301, seconds=0.25,
)  # fmt: skip
SHOWN = {
    "quantised layer": quantized(),
    "rounded layer": quantized("rtn", "mxfp4"),
    "plain matrix": mg.quantize(np.ones((2, 32), np.float32)),
    "from disk": replace(quantized(), report=None, recipe=None, activations=mg.Activations("nvfp4", tensor_scale=12.5)),
    "report": REPORT,
    "report of a layer": quantized("gptq").report,
    "refined layer": quantized("best"),
    "recipe": mg.Recipe.named("mr-gptq", "mxfp4", "fp_quant", "mxfp4"),
    "plain recipe": mg.Recipe.named("rtn"),
    "full recipe": mg.Recipe(scales="gptq", tensor_scale="alternating", order="group", damping=0.03, rounds=4, cross=0.25, activations="nvfp4", activation_rule="mse", precision="float32"),
}


def table_of(shown):
    """(caption, {name: value}) of the notebook's table, by an XML parser, which takes nothing that is not closed, quoted and escaped."""
    root = ElementTree.fromstring(shown._repr_html_())
    assert root.tag == "table" and root[0].tag == "caption"
    rows = {}
    for row in root[1:]:
        assert row.tag == "tr" and [cell.tag for cell in row] == ["th", "td"]
        assert row[0].text not in rows
        rows[row[0].text] = row[1].text
    return root[0].text, rows


def lines_of(shown):
    """(title, {name: value}) of the terminal's lines."""
    title, *lines = repr(shown).split("\n")
    rows = {}
    for line in lines:
        assert line.startswith("  ") and line == line.rstrip()
        name, _, value = line.strip().partition("  ")
        rows[name] = value.strip()
    return title, rows


@pytest.mark.parametrize("what", SHOWN)
def test_terminal_and_notebook_say_the_same(what):
    assert lines_of(SHOWN[what]) == table_of(SHOWN[what])


@pytest.mark.parametrize("what", SHOWN)
def test_lines_are_aligned(what):
    """Every value begins in one column, two blanks behind the longest name."""
    _, *lines = repr(SHOWN[what]).split("\n")
    names = table_of(SHOWN[what])[1]
    start = 2 + max(map(len, names)) + 2
    assert len(lines) == len(names) > 2
    for line, (name, value) in zip(lines, names.items(), strict=True):
        assert line == f"  {name}".ljust(start) + value


@pytest.mark.parametrize("what", SHOWN)
def test_html_is_balanced(what):
    opened = []

    class Balance(HTMLParser):
        def handle_starttag(self, tag, attrs):
            opened.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Balance().feed(SHOWN[what]._repr_html_())
    assert opened == []


def test_what_came_from_outside_is_escaped():
    html = REPORT._repr_html_()
    assert "<b>" not in html and "&lt;b&gt;not&lt;/b&gt; factorised &amp;" in html
    assert table_of(REPORT)[1]["fallback"] == REPORT.fallback
    assert REPORT.fallback in repr(REPORT)


def shares(offsets):
    """As a person would write them: signed steps in ascending order, whole percents, nothing that rounds to none."""
    percents = {steps: 100 * offsets[steps] / sum(offsets.values()) for steps in sorted(offsets)}
    return "  ".join(f"{'+' if steps > 0 else ''}{steps}: {percent:.0f} %" for steps, percent in percents.items() if percent >= 0.5)


def test_a_quantised_layer_shows_its_facts():
    q = SHOWN["quantised layer"]
    title, rows = lines_of(q)
    assert title == "QuantizedMatrix nvfp4, 48 x 128"
    stored = 48 * 64 + 48 * 8 + 4  # codes, scales, tensor scale
    assert rows == {
        "size": f"{stored / 1000:.4g} kB, {8 * stored / (48 * 128):.3f} bits a weight",
        "tensor scale": f"{q.tensor_scale:.4g}",
        "rotation": "Hadamard(16)",
        "scales": "fpquant_mse",
        "relative error": f"{q.report.relative_error:.4g}",
        "by plain rounding": f"{q.report.rounded_error:.4g}",
        "damped, by round": f"{q.report.damped_errors[0]:.4g}",
        "weight error": f"{q.report.weight_error:.4g}",
        "scales off absmax": shares(q.report.scale_offsets),
        "damping": "0.01",
        "precision": "float64",
        "dead columns": "0",  # one dead column among 16 that a rotation mixes
        "fallback": "none",
        "tokens": "300",
        "seconds": f"{q.report.seconds:.4g}",
    }
    assert lines_of(SHOWN["report of a layer"])[1]["dead columns"] == "1"


def test_a_refined_layer_shows_each_round_and_where_its_scales_went():
    report = SHOWN["refined layer"].report
    _, rows = lines_of(SHOWN["refined layer"])
    assert report.rounds > 0 and rows["damped, by round"] == " -> ".join(f"{error:.4g}" for error in report.damped_errors)
    assert len(report.scale_offsets) > 2 and rows["scales off absmax"] == shares(report.scale_offsets)
    assert "cross" not in rows  # the recipe has one, but no cross moment was given


def test_a_report_shows_what_was_done_instead():
    title, rows = lines_of(REPORT)
    assert title == "rounding, mxfp4, 48 x 128"
    assert rows["scales off absmax"] == "-1: 2 %  0: 62 %  +2: 35 %" and rows["damped, by round"] == "0.03457 -> 0.02346 -> 0.02123" and rows["cross"] == "0.75"
    assert rows["by plain rounding"] == "0.07654"
    assert rows["damping"] == "1 (asked 0.01)" and rows["dead columns"] == "3" and rows["relative error"] == "–" and rows["weight error"] == "0.01235"
    for gone in ("damping", "damped, by round", "cross"):
        assert gone not in lines_of(SHOWN["rounded layer"])[1]
    assert "by plain rounding" in lines_of(SHOWN["rounded layer"])[1] and "by plain rounding" not in lines_of(SHOWN["plain matrix"])[1]


def test_every_field_of_a_report_is_shown_or_stands_in_the_title():
    title, rows = lines_of(REPORT)
    text = title + " ".join(rows.values())
    spelt = {"damped_errors": rows["damped, by round"], "scale_offsets": rows["scales off absmax"]}  # each proved above
    for name, value in REPORT.as_dict().items():
        if value is not None:
            assert spelt.get(name, format_number(value)) in text, name


def test_a_recipe_shows_its_facts():
    title, rows = lines_of(SHOWN["recipe"])
    assert title == "Recipe for mxfp4, W4A4"
    assert rows == {
        "rotation": "Hadamard 32", "scales": "fpquant_mse, four-thirds", "solver": "gptq", "order": "activation", "rounds": "0", "damping": "0.01", "precision": "float64",
        "activations": "mxfp4, absmax, four-thirds",
    }  # fmt: skip
    assert lines_of(SHOWN["plain recipe"]) == ("Recipe for nvfp4, W4A16", {"rotation": "none", "scales": "absmax", "solver": "rtn"})
    assert lines_of(SHOWN["full recipe"])[1] == {
        "rotation": "none", "scales": "gptq", "solver": "gptq", "order": "group", "rounds": "4", "damping": "0.03", "precision": "float32", "cross": "0.25", "tensor scale": "alternating",
        "activations": "nvfp4, mse",
    }  # fmt: skip


def test_activations_of_a_checkpoint_are_shown():
    assert lines_of(SHOWN["from disk"])[1]["activations"] == "nvfp4, absmax, tensor scale 12.5"
    assert lines_of(replace(SHOWN["from disk"], activations=mg.Activations("nvfp4", rule="mse")))[1]["activations"] == "nvfp4, mse, tensor scale –"


def test_data_is_never_dumped():
    """A larger matrix shows as many lines as a small one, and none of its codes."""
    small, large = quantized(), quantized(rows=2000)
    for text in (repr(large), large._repr_html_(), str(large), f"{large}"):
        assert len(text) < 2000 and "array" not in text and "uint8" not in text
    assert repr(large).count("\n") == repr(small).count("\n")


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "–"), (True, "yes"), (False, "no"), (3, "3"), (123456, "123456"), (0.000123456, "0.0001235"), (1.0, "1"), (2688.123, "2688"), ("text", "text")]
)
def test_numbers(value, shown):
    assert format_number(value) == shown


@pytest.mark.parametrize(("count", "shown"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1234567, "1.235 MB"), (5e9, "5 GB"), (3.2e13, "32 TB")])
def test_sizes(count, shown):
    assert format_bytes(count) == shown


def test_columns_of_numbers_stand_to_the_right():
    assert align([("name", "n"), ("a", "1"), ("long name", "23")], numeric=(1,)) == "name        n\na           1\nlong name  23"
