"""Recipe: a method as a value that compares, prints, travels as JSON, and refuses what no solver or loader knows."""

import json
import pickle
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest

import mrgptq as mg
from mrgptq.recipe import DIALECTS, NAMES, replace_checked

# One change to every field but the format's own, all of them legal for either base: one format has what the other lacks.
BASES = {"mxfp4": mg.Recipe("mxfp4", order="group"), "nvfp4": mg.Recipe("nvfp4", order="group")}
CHANGES = {
    "mxfp4": {
        "rotation": 64, "scales": "gptq", "mx_rule": "floor", "order": "natural", "solver": "rtn", "damping": 0.5, "rounds": 3, "cross": 0.25, "output_hessian": "fisher", "activations": "mxfp4", "activation_rule": "even",
        "precision": "float32", "pad": True,
    },
    "nvfp4": {
        "rotation": 64, "scales": "four_over_six", "mx_rule": "floor", "tensor_scale": "alternating", "order": "natural", "solver": "rtn", "damping": 0.5, "rounds": 3, "cross": 0.25, "output_hessian": "fisher",
        "activations": "nvfp4", "activation_rule": "mse", "precision": "float32", "pad": True,
    },
}  # fmt: skip
ONLY_ONE_VALUE = {("mxfp4", "tensor_scale")}  # MXFP4 has no tensor scale to fit
FULL = {format: changes | {"solver": "gptq", "order": "group"} for format, changes in CHANGES.items()}  # searched scales, rounds and cross want these two
MORE_SCALES = {"nvfp4": "absmax, fpquant_mse, mse, four_over_six", "mxfp4": "absmax, fpquant_mse, mse, quest"}


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
    common = {
        "rotation": None, "mx_rule": "even", "tensor_scale": "absmax", "order": "activation", "solver": "gptq", "damping": 0.01, "rounds": 0, "cross": 0.0, "output_hessian": None,
        "activation_rule": "absmax", "precision": "float64", "pad": False,
    }  # fmt: skip
    recipe = mg.Recipe.named(name, format, dialect, activations)
    assert recipe.as_dict() == common | {"format": format, "activations": activations} | expected


# What measured best, see bench/accuracy.md.
BEST = {"scales": "gptq", "order": "group", "solver": "gptq", "damping": 0.05, "rounds": 6, "tensor_scale": "absmax", "precision": "float32", "output_hessian": "fisher", "pad": False}


@pytest.mark.parametrize("activations", [False, True], ids=["w4a16", "w4a4"])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("format", CHANGES)
@pytest.mark.parametrize("name", ["best", "best-online"])
def test_best_recipes(name, format, dialect, activations):
    """Weights alone: no rotation, the target moved. Rounded inputs: MXFP4's rotated wherever the runtime will, which is our own or fp_quant's; their scales searched where only our own is asked."""
    recipe = mg.Recipe.named(name, format, dialect, format if activations else None)
    online = name == "best-online" and activations
    assert recipe.as_dict() == BEST | {
        "format": format,
        "mx_rule": "four-thirds" if (format, dialect) == ("mxfp4", "fp_quant") else "even",
        "rotation": 32 if format == "mxfp4" and activations and (online or dialect == "fp_quant") else None,
        "cross": 0.1 if activations else 0.4,
        "activations": format if activations else None,
        "activation_rule": "mse" if online and dialect != "fp_quant" else "absmax",
    }


@pytest.mark.parametrize("activations", [False, True], ids=["w4a16", "w4a4"])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("format", CHANGES)
def test_best_is_what_its_dialect_stores_and_best_online_what_our_own_does(format, dialect, activations):
    """The promise of the two names, kept by the dialect's own check; fp_quant knows no W4A16 at all."""
    from mrgptq.checkpoint import Scheme, dialect_named

    best, online = (Scheme.of_recipe(mg.Recipe.named(name, format, dialect, format if activations else None)) for name in ("best", "best-online"))
    if dialect == "fp_quant" and not activations:
        with pytest.raises(ValueError, match="fp_quant checkpoints are W4A4"):
            dialect_named(dialect).check(best)
        return
    dialect_named(dialect).check(best)
    assert best.rotation is None or dialect != "compressed-tensors"  # transformers would ignore it
    if dialect == "compressed-tensors" and activations:
        with pytest.raises(ValueError, match='find activation scales by "absmax"; the recipe asks for "mse".*dialect "mrgptq"'):
            dialect_named(dialect).check(online)
    else:
        dialect_named(dialect).check(online)


def test_quantize_layer_takes_every_name():
    w = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    for name in NAMES:
        assert mg.quantize_layer(w, np.eye(64), name, format="mxfp4").recipe == mg.Recipe.named(name, "mxfp4")
    assert NAMES == ("rtn", "gptq", "mr-gptq", "best", "best-online")


@pytest.mark.parametrize("format", CHANGES)
def test_the_changes_cover_every_field(format):
    only_one = {field for name, field in ONLY_ONE_VALUE if name == format}
    assert set(CHANGES[format]) | only_one | {"format"} == {f.name for f in fields(mg.Recipe)} and not only_one & set(CHANGES[format])


@pytest.mark.parametrize(("format", "field"), [(format, field) for format in CHANGES for field in CHANGES[format]])
def test_replace_equality_and_hash_see_every_field(format, field):
    base, change = BASES[format], CHANGES[format][field]
    changed = replace(base, **{field: change})
    assert getattr(changed, field) == change and changed != base and hash(changed) != hash(base)
    assert changed == replace_checked(base, **{field: change}) == mg.Recipe(format, **{"order": "group", field: change})
    assert replace(changed, **{field: getattr(base, field)}) == base
    assert len({base, changed, mg.Recipe(format, order="group")}) == 2
    assert BASES["nvfp4"] != BASES["mxfp4"]


@pytest.mark.parametrize("recipe", [mg.Recipe(), *[mg.Recipe(format, **FULL[format]) for format in FULL], *[mg.Recipe.named(name, format, dialect, format) for name in NAMES for format in FULL for dialect in DIALECTS]])
def test_json_and_pickle_round_trips(recipe):
    text = recipe.to_json()
    assert "\n" not in text and json.loads(text) == recipe.as_dict()
    for back in (mg.Recipe.from_json(text), mg.Recipe.from_dict(recipe.as_dict()), pickle.loads(pickle.dumps(recipe))):
        assert back == recipe and hash(back) == hash(recipe) and back.to_json() == text


def test_numpy_numbers_become_plain_ones():
    recipe = mg.Recipe(rotation=np.int64(32), damping=np.float32(0.5), order="group", rounds=np.int32(2), cross=np.float32(0.25))
    assert recipe == mg.Recipe(rotation=32, damping=0.5, order="group", rounds=2, cross=0.25)
    assert {type(getattr(recipe, field)) for field in ("rotation", "rounds")} == {int} and {type(getattr(recipe, field)) for field in ("damping", "cross")} == {float}
    assert mg.Recipe.from_json(recipe.to_json()) == recipe
    assert type(mg.Recipe(cross=1).cross) is float


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


@pytest.mark.parametrize("format", CHANGES)
@pytest.mark.parametrize(("rule", "mx_rule"), [("absmax", "even"), ("absmax", "ceil"), ("mse", "even"), ("fpquant_mse", "floor"), ("even", "ceil"), ("four-thirds", "even"), ("four_over_six", "even"), ("quest", "even")])
def test_activations_are_rounded_by_the_rule_of_the_recipe(format, rule, mx_rule):
    """Every rule of quantize that needs the group alone, resolved as the weights' are; the names of the other format are refused."""
    if rule in {"mxfp4": ("four_over_six",), "nvfp4": ("even", "four-thirds", "quest")}[format]:
        with pytest.raises(ValueError, match=f"unknown activation_rule for {format} '{rule}'; known: {MORE_SCALES[format]}"):
            mg.Recipe(format, activations=format, activation_rule=rule)
        return
    recipe = mg.Recipe(format, solver="rtn", scales="absmax", mx_rule=mx_rule, activations=format, activation_rule=rule)
    activations = mg.quantize_layer(np.ones((2, 32), np.float32), None, recipe).activations
    x = np.random.default_rng(2).standard_t(3, (50, 64)).astype(np.float32)
    seen = mg.round_activations(x, format, rule=activations.rule, mx_rule=activations.mx_rule)
    assert np.array_equal(seen, mg.quantize(x, format, scales=rule, mx_rule=mx_rule).dequantize())
    assert activations == mg.Activations(format, rule if rule in mg.MX_RULES else mx_rule, None, "absmax" if rule in mg.MX_RULES else rule)


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
        ({"scales": "quest"}, ValueError, f"unknown scales for nvfp4 'quest'; known: {MORE_SCALES['nvfp4']}, hessian, hessian_block, gptq$"),
        ({"scales": "floor"}, ValueError, f"unknown scales for nvfp4 'floor'; known: {MORE_SCALES['nvfp4']}, hessian, hessian_block, gptq$"),
        ({"scales": "x", "format": "mxfp4"}, ValueError, f"unknown scales for mxfp4 'x'; known: {MORE_SCALES['mxfp4']}, hessian, hessian_block, gptq, floor, ceil, even, four-thirds$"),
        ({"scales": "four_over_six", "format": "mxfp4"}, ValueError, f"unknown scales for mxfp4 'four_over_six'; known: {MORE_SCALES['mxfp4']}"),
        ({"scales": "quest", "format": "mxfp4", "mx_rule": "four-thirds"}, ValueError, 'scales is "quest", which makes powers of two; mx_rule is "four-thirds"'),
        ({"scales": "gptq"}, ValueError, "scales \"gptq\" needs the order \"group\"; the recipe has 'activation'"),
        ({"scales": "gptq", "order": "natural"}, ValueError, "scales \"gptq\" needs the order \"group\"; the recipe has 'natural'"),
        ({"scales": "gptq", "order": "group", "solver": "rtn"}, ValueError, "scales \"gptq\" needs the solver \"gptq\"; the recipe has 'rtn'"),
        ({"tensor_scale": "max"}, ValueError, "unknown tensor_scale for nvfp4 'max'; known: absmax, alternating"),
        ({"tensor_scale": None}, ValueError, "unknown tensor_scale for nvfp4 None; known: absmax, alternating"),
        ({"tensor_scale": "alternating", "format": "mxfp4"}, ValueError, "unknown tensor_scale for mxfp4 'alternating'; known: absmax$"),
        ({"mx_rule": "odd"}, ValueError, "unknown mx_rule 'odd'; known: floor, ceil, even, four-thirds"),
        ({"order": "random"}, ValueError, "unknown order 'random'; known: natural, activation, group$"),
        ({"solver": "awq"}, ValueError, "unknown solver 'awq'; known: rtn, gptq"),
        ({"damping": -0.01}, ValueError, r"damping is -0\.01; it must be a finite number from 0 on"),
        ({"damping": float("nan")}, ValueError, "damping is nan"),
        ({"damping": float("inf")}, ValueError, "damping is inf"),
        ({"damping": "0.01"}, TypeError, r"damping is '0\.01'; it must be a real number"),
        ({"damping": None}, TypeError, "damping is None; it must be a real number"),
        ({"damping": True}, TypeError, "damping is True; it must be a real number"),
        ({"rounds": 1}, ValueError, "rounds 1 needs the order \"group\"; the recipe has 'activation'"),
        ({"rounds": 2, "order": "natural"}, ValueError, "rounds 2 needs the order \"group\"; the recipe has 'natural'"),
        ({"rounds": 1, "order": "group", "solver": "rtn"}, ValueError, "rounds 1 needs the solver \"gptq\"; the recipe has 'rtn'"),
        ({"rounds": -1, "order": "group"}, ValueError, "rounds is -1; it must be an integer from 0 to 1000"),
        ({"rounds": True, "order": "group"}, ValueError, "rounds is True; it must be an integer from 0 to 1000"),
        ({"rounds": False}, ValueError, "rounds is False; it must be an integer from 0 to 1000"),
        ({"rounds": 1.0, "order": "group"}, ValueError, r"rounds is 1\.0; it must be an integer"),
        ({"rounds": "1", "order": "group"}, ValueError, "rounds is '1'; it must be an integer"),
        ({"rounds": None}, ValueError, "rounds is None; it must be an integer"),
        ({"cross": -0.1}, ValueError, r"cross is -0\.1; it must be from 0 to 1"),
        ({"cross": 1.5}, ValueError, r"cross is 1\.5; it must be from 0 to 1"),
        ({"cross": np.nextafter(1, 2)}, ValueError, "cross is 1.0000000000000002; it must be from 0 to 1"),
        ({"cross": float("nan")}, ValueError, "cross is nan; it must be from 0 to 1"),
        ({"cross": float("inf")}, ValueError, "cross is inf; it must be from 0 to 1"),
        ({"cross": True}, TypeError, "cross is True; it must be a real number"),
        ({"cross": "0.5"}, TypeError, r"cross is '0\.5'; it must be a real number"),
        ({"cross": None}, TypeError, "cross is None; it must be a real number"),
        ({"cross": 0.5, "solver": "rtn"}, ValueError, "cross 0.5 needs the solver \"gptq\"; the recipe has 'rtn'"),
        ({"activations": "mxfp4"}, ValueError, "unknown activations for nvfp4 'mxfp4'; known: None, nvfp4"),
        ({"activations": "int8"}, ValueError, "unknown activations for nvfp4 'int8'"),
        ({"activation_rule": "hessian"}, ValueError, f"unknown activation_rule for nvfp4 'hessian'; known: {MORE_SCALES['nvfp4']}$"),
        ({"activation_rule": "gptq", "format": "mxfp4"}, ValueError, f"unknown activation_rule for mxfp4 'gptq'; known: {MORE_SCALES['mxfp4']}, floor, ceil, even, four-thirds$"),
        ({"activation_rule": "quest", "format": "mxfp4", "mx_rule": "four-thirds"}, ValueError, 'activation_rule is "quest", which makes powers of two; mx_rule is "four-thirds"'),
        ({"activation_rule": "even"}, ValueError, f"unknown activation_rule for nvfp4 'even'; known: {MORE_SCALES['nvfp4']}$"),
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
    with pytest.raises(ValueError, match="unknown recipe 'better'; known: rtn, gptq, mr-gptq, best, best-online$"):
        mg.Recipe.named("better")
    with pytest.raises(ValueError, match="unknown dialect 'gguf'; known: compressed-tensors, fp_quant, mrgptq$"):
        mg.Recipe.named("mr-gptq", dialect="gguf")
    with pytest.raises(ValueError, match="unknown format 'int4'; known: mxfp4, nvfp4"):
        mg.Recipe.named("mr-gptq", "int4")


def test_the_dialects_of_recipes_are_those_of_checkpoints():
    """recipe.py stands before checkpoint/ in the order of imports, so it holds the names itself."""
    from mrgptq import recipe
    from mrgptq.checkpoint import DIALECTS

    assert set(recipe.DIALECTS) == set(DIALECTS)
