"""Which layers of a checkpoint are quantised, and which of them share a tensor scale."""

import re

import pytest

from mrgptq.modules import DEFAULT_IGNORE, DEFAULT_TARGETS, as_pattern, fused_groups, select_modules

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def decoder(blocks, prefix="model"):
    """Tensor names and shapes of a Llama-like checkpoint."""
    names = [f"{prefix}.embed_tokens.weight", "lm_head.weight"]
    for i in range(blocks):
        names += [f"{prefix}.layers.{i}.self_attn.{leaf}.weight" for leaf in ATTENTION] + [f"{prefix}.layers.{i}.mlp.{leaf}.weight" for leaf in MLP]
    shapes = dict.fromkeys(names, (8, 8))
    for i in range(blocks):
        shapes |= {f"{prefix}.layers.{i}.input_layernorm.weight": (8,), f"{prefix}.layers.{i}.self_attn.q_proj.bias": (8,), f"{prefix}.layers.{i}.self_attn.q_norm.weight": (4,)}
    return shapes | {f"{prefix}.norm.weight": (8,)}


def test_every_linear_layer_of_every_block_and_nothing_else():
    assert select_modules(decoder(11)) == [f"model.layers.{i}.{leaf}" for i in range(11) for leaf in [f"self_attn.{a}" for a in ATTENTION] + [f"mlp.{m}" for m in MLP]]


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("model.layers.0.mlp.experts.7.gate_proj", True),
        ("model.layers.0.block_sparse_moe.experts.0.w1", True),
        ("model.layers.0.linear_attn.out_proj", True),
        # Routers: a few rows that decide which expert a token meets (Qwen, Mixtral, DeepSeek, Granite).
        ("model.layers.0.mlp.gate", False),
        ("model.layers.0.block_sparse_moe.gate", False),
        ("model.layers.0.mlp.shared_expert_gate", False),
        ("model.layers.0.block_sparse_moe.router.layer", False),
        # Not in a block, or no linear layer though a matrix.
        ("model.embed_tokens", False),
        ("model.layers.0.embed_tokens", False),
        ("lm_head", False),
        ("score", False),
        ("model.layers.0.post_norm", False),
    ],
)
def test_default_targets_by_name(name, chosen):
    other = "model.layers.9.self_attn.o_proj"
    assert select_modules({f"{name}.weight": (4, 4), f"{other}.weight": (4, 4)}) == ([name, other] if chosen else [other])


@pytest.mark.parametrize(
    ("targets", "ignore", "leaves"),
    [
        (DEFAULT_TARGETS, DEFAULT_IGNORE, {*ATTENTION, *MLP}),
        (DEFAULT_TARGETS, "down_proj", {*ATTENTION, "gate_proj", "up_proj"}),
        ("mlp", DEFAULT_IGNORE, set(MLP)),
        ("mlp", "down|up", {"gate_proj"}),
        ("_proj$", "", {*ATTENTION, *MLP}),
        ("lm_head|q_proj", "", {"lm_head", "q_proj"}),  # an empty ignore ignores nothing, not everything
        ("lm_head|q_proj", "lm_head", {"q_proj"}),
        ("^model.layers.0", "", {*ATTENTION, *MLP}),
    ],
)
def test_targets_and_ignore(targets, ignore, leaves):
    chosen = select_modules(decoder(1), targets, ignore)
    assert {name.rpartition(".")[2] for name in chosen} == leaves
    assert len(chosen) == len(leaves)


def test_only_matrices_called_weight_count():
    shapes = {"a.0.x.weight": (2, 2), "a.0.bias.weight": (2,), "a.0.experts.weight": (2, 2, 2), "a.0.scale": (2, 2), "a.0.y.weight_packed": (2, 2), "a.0.z.weight": ()}
    assert select_modules(shapes) == ["a.0.x"]


@pytest.mark.parametrize(("targets", "ignore", "words"), [("(", "", ("targets", "'('", "not a regular expression")), ("x", "[a", ("ignore", "'[a'", "not a regular expression"))])
def test_what_is_no_regular_expression_is_refused(targets, ignore, words):
    with pytest.raises(ValueError) as refusal:
        select_modules(decoder(1), targets, ignore)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize(("targets", "ignore", "count"), [("nothing_is_called_so", "lm_head", 9), (DEFAULT_TARGETS, ".", 9)])
def test_nothing_left_is_refused_with_both_patterns(targets, ignore, count):
    with pytest.raises(ValueError) as refusal:
        select_modules(decoder(1), targets, ignore)
    assert all(word in str(refusal.value) for word in ("no module to quantise", f"of {count} matrices", repr(targets), repr(ignore))), refusal.value


def test_a_pattern_is_the_compiled_expression():
    assert as_pattern("a+", "targets") == re.compile("a+")


def test_layers_that_read_one_input_are_grouped_once_in_the_order_of_their_first_member():
    names = [f"model.layers.{i}.{leaf}" for i in (0, 10) for leaf in ("self_attn.v_proj", "self_attn.o_proj", "self_attn.q_proj", "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj", "self_attn.k_proj")]
    expected = []
    for i in (0, 10):
        a, m = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        expected += [(f"{a}.q_proj", f"{a}.k_proj", f"{a}.v_proj"), (f"{a}.o_proj",), (f"{m}.gate_proj", f"{m}.up_proj"), (f"{m}.down_proj",)]
    assert fused_groups(names) == expected


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["m.experts.0.w1", "m.experts.0.w2", "m.experts.0.w3", "m.experts.1.w1"], [("m.experts.0.w1", "m.experts.0.w3"), ("m.experts.0.w2",), ("m.experts.1.w1",)]),
        (["a.q_proj", "b.k_proj"], [("a.q_proj",), ("b.k_proj",)]),  # of different parents
        (["a.k_proj", "a.v_proj"], [("a.k_proj", "a.v_proj")]),  # q_proj left out by ignore
        (["q_proj", "v_proj"], [("q_proj", "v_proj")]),  # no parent at all
        (["a.qkv_proj", "a.my_q_proj", "a.q_proj"], [("a.qkv_proj",), ("a.my_q_proj",), ("a.q_proj",)]),
        ([], []),
    ],
)
def test_groups_follow_parent_and_leaf(names, groups):
    assert fused_groups(names) == groups
    assert sorted(name for group in fused_groups(names) for name in group) == sorted(names)
