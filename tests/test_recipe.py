"""Recipe: a method as a value that compares, prints, travels as JSON, and refuses what no solver or loader knows."""

import json
import pickle
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest

import mrgptq as mg
from mrgptq.recipe import NAMES, replace_checked

# One change to every field, all of them legal for MXFP4.
CHANGES = {
    "rotation": 64, "scales": "ceil", "mx_rule": "floor", "order": "natural", "solver": "rtn", "damping": 0.5, "activations": "mxfp4", "precision": "float32",
}  # fmt: skip
ONLY_ONE_VALUE = {"rounds", "activation_rule"}


@pytest.mark.parametrize(
    ("name", "format", "dialect", "expected"),
    [
        ("rtn", "nvfp4", "compressed-tensors", {"scales": "absmax", "solver": "rtn", "order": "natural"}),
        ("rtn", "mxfp4", "fp_quant", {"scales": "absmax", "solver": "rtn", "order": "natural", "mx_rule": "four-thirds"}),
        ("gptq", "nvfp4", "fp_quant", {"scales": "absmax"}),
        ("gptq", "mxfp4", "compressed-tensors", {"scales": "absmax"}),
        ("mr-gptq", "nvfp4", "compressed-tensors", {"scales": "fpquant_mse", "rotation": 16}),
        ("mr-gptq", "nvfp4", "fp_quant", {"scales": "fpquant_mse", "rotation": 16}),
        ("mr-gptq", "mxfp4", "compressed-tensors", {"scales": "fpquant_mse", "rotation": 32}),
        ("mr-gptq", "mxfp4", "fp_quant", {"scales": "fpquant_mse", "rotation": 32, "mx_rule": "four-thirds"}),
    ],
)
@pytest.mark.parametrize("quantise_activations", [False, True])
def test_named_recipes(name, format, dialect, expected, quantise_activations):
    """The paper's: Hadamard 16 for NVFP4 and 32 for MXFP4, damping 0.01, static activation order; only fp_quant can store four-thirds."""
    activations = format if quantise_activations else None
    common = {"rotation": None, "mx_rule": "even", "order": "activation", "solver": "gptq", "damping": 0.01, "rounds": 0, "activation_rule": "absmax", "precision": "float64"}
    recipe = mg.Recipe.named(name, format, dialect, activations)
    assert recipe.as_dict() == common | {"format": format, "activations": activations} | expected


def test_quantize_layer_takes_every_name():
    w = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    for name in NAMES:
        assert mg.quantize_layer(w, np.eye(64), name, format="mxfp4").recipe == mg.Recipe.named(name, "mxfp4")


def test_the_changes_cover_every_field():
    assert set(CHANGES) | ONLY_ONE_VALUE | {"format"} == {f.name for f in fields(mg.Recipe)}


@pytest.mark.parametrize("field", CHANGES)
def test_replace_equality_and_hash_see_every_field(field):
    base = mg.Recipe("mxfp4")
    changed = replace(base, **{field: CHANGES[field]})
    assert getattr(changed, field) == CHANGES[field] and changed != base and hash(changed) != hash(base)
    assert changed == replace_checked(base, **{field: CHANGES[field]}) == mg.Recipe("mxfp4", **{field: CHANGES[field]})
    assert replace(changed, **{field: getattr(base, field)}) == base
    assert len({base, changed, mg.Recipe("mxfp4")}) == 2
    assert mg.Recipe("nvfp4") != base


@pytest.mark.parametrize("recipe", [mg.Recipe(), mg.Recipe("mxfp4", **CHANGES), *[mg.Recipe.named(name, "mxfp4", "fp_quant", "mxfp4") for name in NAMES]])
def test_json_and_pickle_round_trips(recipe):
    text = recipe.to_json()
    assert "\n" not in text and json.loads(text) == recipe.as_dict()
    for back in (mg.Recipe.from_json(text), mg.Recipe.from_dict(recipe.as_dict()), pickle.loads(pickle.dumps(recipe))):
        assert back == recipe and hash(back) == hash(recipe) and back.to_json() == text


def test_numpy_numbers_become_plain_ones():
    recipe = mg.Recipe(rotation=np.int64(32), damping=np.float32(0.5))
    assert recipe == mg.Recipe(rotation=32, damping=0.5)
    assert mg.Recipe.from_json(recipe.to_json()) == recipe


def test_a_recipe_cannot_be_changed_in_place():
    with pytest.raises(FrozenInstanceError):
        mg.Recipe().damping = 0.1


def test_fields_left_out_of_json_take_their_defaults():
    assert mg.Recipe.from_json('{"format": "mxfp4"}') == mg.Recipe("mxfp4")


@pytest.mark.parametrize(("scales", "mx_rule", "expected"), [("absmax", "ceil", "ceil"), ("floor", "ceil", "floor"), (None, "even", "even"), ("fpquant_mse", "four-thirds", "four-thirds")])
def test_a_rule_named_by_scales_wins_over_mx_rule(scales, mx_rule, expected):
    recipe = mg.Recipe("mxfp4", scales=scales, mx_rule=mx_rule)
    assert recipe.resolved_mx_rule == expected
    w = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)
    q = mg.quantize_layer(w, None, replace(recipe, solver="rtn"))
    same_rule = mg.quantize(w, "mxfp4", scales="fpquant_mse" if scales == "fpquant_mse" else "absmax", mx_rule=expected)
    assert np.array_equal(q.scales, same_rule.scales) and q.tensor_scale == same_rule.tensor_scale


# Two answers a field: the offending value, then what is allowed.
@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"format": "fp4"}, ValueError, "unknown format 'fp4'; known: mxfp4, nvfp4"),
        ({"format": None}, ValueError, "unknown format None; known: mxfp4, nvfp4"),
        ({"rotation": 48}, ValueError, "block_size is 48; it must be a power of two from 2 on"),
        ({"rotation": 1}, ValueError, "block_size is 1; it must be a power of two"),
        ({"rotation": True}, ValueError, "block_size is True"),
        ({"rotation": 16.0}, ValueError, r"block_size is 16\.0"),
        ({"scales": "mse"}, ValueError, "unknown scales for nvfp4 'mse'; known: absmax, fpquant_mse"),
        ({"scales": "floor"}, ValueError, "unknown scales for nvfp4 'floor'; known: absmax, fpquant_mse"),
        ({"scales": "x", "format": "mxfp4"}, ValueError, "unknown scales for mxfp4 'x'; known: absmax, fpquant_mse, floor, ceil, even, four-thirds"),
        ({"mx_rule": "odd"}, ValueError, "unknown mx_rule 'odd'; known: floor, ceil, even, four-thirds"),
        ({"order": "random"}, ValueError, "unknown order 'random'; known: natural, activation"),
        ({"solver": "awq"}, ValueError, "unknown solver 'awq'; known: rtn, gptq"),
        ({"damping": -0.01}, ValueError, r"damping is -0\.01; it must be a finite number from 0 on"),
        ({"damping": float("nan")}, ValueError, "damping is nan"),
        ({"damping": float("inf")}, ValueError, "damping is inf"),
        ({"damping": "0.01"}, TypeError, r"damping is '0\.01'; it must be a real number"),
        ({"damping": None}, TypeError, "damping is None; it must be a real number"),
        ({"damping": True}, TypeError, "damping is True; it must be a real number"),
        ({"rounds": 1}, ValueError, "unknown rounds 1; known: 0"),
        ({"activations": "mxfp4"}, ValueError, "unknown activations for nvfp4 'mxfp4'; known: None, nvfp4"),
        ({"activations": "int8"}, ValueError, "unknown activations for nvfp4 'int8'"),
        ({"activation_rule": "mse"}, ValueError, "unknown activation_rule 'mse'; known: absmax"),
        ({"precision": "float16"}, ValueError, "unknown precision 'float16'; known: float32, float64"),
    ],
)
def test_every_field_is_checked(given, error, words):
    with pytest.raises(error, match=words):
        mg.Recipe(**given)
    with pytest.raises(error, match=words):
        replace(mg.Recipe(), **given)
    with pytest.raises(error, match=words):
        mg.Recipe.from_dict(given)


def test_unknown_fields_and_names_are_refused_with_the_known_ones():
    known = ", ".join(f.name for f in fields(mg.Recipe))
    for call in (lambda: mg.Recipe.from_dict({"dampening": 1}), lambda: mg.Recipe.from_json('{"dampening": 1}'), lambda: replace_checked(mg.Recipe(), dampening=1)):
        with pytest.raises(ValueError, match=f"unknown recipe field 'dampening'; known: {known}"):
            call()
    with pytest.raises(ValueError, match="unknown recipe 'best'; known: rtn, gptq, mr-gptq"):
        mg.Recipe.named("best")
    with pytest.raises(ValueError, match="unknown dialect 'gguf'; known: compressed-tensors, fp_quant"):
        mg.Recipe.named("mr-gptq", dialect="gguf")
    with pytest.raises(ValueError, match="unknown format 'int4'; known: mxfp4, nvfp4"):
        mg.Recipe.named("mr-gptq", "int4")


def test_the_dialects_of_recipes_are_those_of_checkpoints():
    """recipe.py stands before checkpoint/ in the order of imports, so it holds the names itself."""
    from mrgptq import recipe
    from mrgptq.checkpoint import DIALECTS

    assert set(recipe.DIALECTS) == set(DIALECTS)
