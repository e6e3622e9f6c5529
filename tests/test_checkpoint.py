"""mg.save and mg.load: what lies on disk in each dialect, read and decoded by safetensors, torch and compressed-tensors; what is refused, and that nothing is left then."""

import errno
import json
import shutil
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.transform import TransformConfig
from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix
from transformers import FPQuantConfig

import mrgptq as mg

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
SHAPES = {Q: (24, 128), DOWN: (16, 256)}
E2M1 = torch.from_numpy(np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32))
GROUP = {"nvfp4": 16, "mxfp4": 32}


@dataclass(frozen=True)
class Kind:
    dialect: str
    format: str
    activations: bool
    rotation: int | None
    rule: str = "absmax"
    thirds: bool = False

    @property
    def mx_rule(self):
        return "four-thirds" if self.thirds or (self.dialect, self.format) == ("fp_quant", "mxfp4") else "even"


KINDS = [Kind("compressed-tensors", f, a, r) for f in GROUP for a in (False, True) for r in (None, 16, 64)] + [Kind("fp_quant", f, True, r) for f in GROUP for r in (None, 32, 128)]
# What our own dialect has to say is everything a recipe can: each activation rule, either MX rule's divisor, rotations that no other dialect stores.
RULES = {"nvfp4": ("absmax", "fpquant_mse", "mse", "four_over_six"), "mxfp4": ("absmax", "fpquant_mse", "mse", "quest", "floor", "ceil", "even", "four-thirds")}
KINDS += [Kind("mrgptq", f, False, r, thirds=t) for f in GROUP for r in (None, 2, 128) for t in ((False, True) if f == "mxfp4" else (False,))]
KINDS += [Kind("mrgptq", f, True, r, rule, t) for f in GROUP for rule in RULES[f] for r in (None, 16) for t in ((False, True) if f == "mxfp4" and rule != "quest" else (False,))]


def layer(kind, name, *, input_scale=37.5):
    """A random matrix with outliers, rounded as ``kind`` asks; its activations calibrated to ``input_scale``."""
    rng = np.random.default_rng(len(name))
    weight = rng.standard_normal(SHAPES[name]) * np.exp2(rng.integers(-6, 3, (SHAPES[name][0], 1)))
    weight[:, :32] = 0  # a zero group, whose scale is an edge of both formats
    activations = kind.format if kind.activations else None
    recipe = replace(mg.Recipe.named("rtn", kind.format, kind.dialect, activations), rotation=kind.rotation, activation_rule=kind.rule, mx_rule=kind.mx_rule)
    matrix = mg.quantize_layer(weight, None, recipe)
    if activations == "nvfp4":
        matrix = replace(matrix, activations=replace(matrix.activations, tensor_scale=input_scale))
    return matrix


def model(kind):
    rng = np.random.default_rng(0)
    return {
        "model.embed_tokens.weight": mg.StoredTensor.from_bits("BF16", rng.integers(0, 2**14, (32, 128)).astype(np.uint16)),
        **{f"{name}.weight": layer(kind, name, input_scale=37.5 + i) for i, name in enumerate(SHAPES)},
        f"{Q}.bias": rng.standard_normal(24).astype(np.float16),
        "model.norm.weight": rng.standard_normal(128).astype(np.float32),
        "model.layers.0.mlp.gate.weight": rng.standard_normal((4, 128)).astype(np.float32),
    }


def on_disk(folder):
    """Every tensor of every shard, by the safetensors library."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(file)
    return tensors


def save(path, kind, tensors=None, **options):
    mg.save(path, model(kind) if tensors is None else tensors, kind.dialect, config={"model_type": "llama", "hidden_size": 128}, **options)
    return json.loads((path / "config.json").read_text())


@pytest.fixture(scope="module", params=KINDS, ids=lambda k: f"{k.dialect}-{k.format}-{'w4a4' if k.activations else 'w4a16'}-{k.rotation}-{k.rule}-{k.mx_rule}")
def saved(request, tmp_path_factory):
    """(kind, tensors as given, folder, config.json)."""
    tensors = model(request.param)
    folder = tmp_path_factory.mktemp("saved") / "out"
    return request.param, tensors, folder, save(folder, request.param, tensors)


def parts(kind, name):
    """{part: (dtype, shape)} of formats.md 1.1 and 1.2."""
    rows, cols = SHAPES[name]
    packed, scales, one = (torch.uint8, (rows, cols // 2)), (rows, cols // GROUP[kind.format]), (torch.float32, (1,))
    if kind.dialect == "fp_quant":
        block = (torch.bfloat16, (kind.rotation or GROUP[kind.format],) * 2)
        return {"qweight": packed, "scales": (torch.uint8, scales), "weight_global_scale": one, "act_global_scale": one, "forward_hadamard_matrix": block, "backward_hadamard_matrix": block}
    if kind.dialect == "mrgptq":  # the divisor beside MXFP4 too; a rotation is said in config.json alone
        expected = {"weight_packed": packed, "weight_scale": (torch.float8_e4m3fn if kind.format == "nvfp4" else torch.uint8, scales), "weight_global_scale": one}
        return expected | ({"input_global_scale": one} if kind.activations and kind.format == "nvfp4" else {})
    expected = {"weight_packed": packed, "weight_scale": (torch.float8_e4m3fn if kind.format == "nvfp4" else torch.uint8, scales)}
    if kind.format == "nvfp4":
        expected |= {"weight_global_scale": one} | ({"input_global_scale": one} if kind.activations else {})
    return expected | ({"v_input.weight": (torch.bfloat16, (kind.rotation,) * 2)} if kind.rotation else {})


def test_names_dtypes_and_shapes_on_disk(saved):
    kind, _, folder, _ = saved
    expected = {f"{name}.{part}": form for name in SHAPES for part, form in parts(kind, name).items()}
    expected |= {"model.embed_tokens.weight": (torch.bfloat16, (32, 128)), f"{Q}.bias": (torch.float16, (24,)), "model.norm.weight": (torch.float32, (128,)), "model.layers.0.mlp.gate.weight": (torch.float32, (4, 128))}
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in on_disk(folder).items()} == expected


def test_decoding_by_hand_gives_the_values(saved):
    """The format's definition in torch: even column in the low nibble, e2m1 * float32(scale / divisor), E8M0 a power of two, E4M3 by torch's own cast."""
    kind, tensors, folder, _ = saved
    stored = on_disk(folder)
    for name in SHAPES:
        packed = stored[f"{name}.qweight" if kind.dialect == "fp_quant" else f"{name}.weight_packed"]
        bits = stored[f"{name}.scales" if kind.dialect == "fp_quant" else f"{name}.weight_scale"].view(torch.uint8)
        scale = bits.view(torch.float8_e4m3fn).float() if kind.format == "nvfp4" else torch.exp2(bits.float() - 127)
        step = scale / stored.get(f"{name}.weight_global_scale", torch.ones(1))
        values = E2M1[torch.stack((packed & 15, packed >> 4), -1).flatten(1).long()].unflatten(1, (-1, GROUP[kind.format])) * step[..., None]
        assert np.array_equal(values.flatten(1).numpy(), tensors[f"{name}.weight"].dequantize())
        assert values.abs().max() > 0.1


def test_everything_comes_back(saved):
    kind, tensors, folder, _ = saved
    loaded = mg.load(folder)
    assert loaded.keys() == tensors.keys()
    for name, given in tensors.items():
        got = loaded[name]
        if not isinstance(given, mg.QuantizedMatrix):
            assert mg.StoredTensor.of(got).dtype == mg.StoredTensor.of(given).dtype
            assert np.array_equal(np.asarray(got), np.asarray(given))
            continue
        assert got.codes.tobytes() == given.codes.tobytes() and got.scales.tobytes() == given.scales.tobytes()
        assert (got.format, got.shape, got.tensor_scale, got.rotation, got.activations) == (given.format, given.shape, given.tensor_scale, given.rotation, given.activations)
        assert np.array_equal(got.dequantize(unrotate=True), given.dequantize(unrotate=True))


def test_the_configuration_is_what_the_library_means_by_it(saved):
    kind, _, folder, config = saved
    written = config.pop("quantization_config")
    assert config == {"model_type": "llama", "hidden_size": 128} | ({"dtype": "bfloat16"} if kind.dialect == "compressed-tensors" else {})
    unquantised = ["model.layers.0.mlp.gate", "lm_head"]  # lm_head: its weight is not in the file where embeddings are tied
    stored = on_disk(folder)
    if kind.dialect == "mrgptq":
        by_name = kind.rule in ("floor", "ceil", "even", "four-thirds")  # absmax by that MX rule, and stored as what it is
        mx_rule = (kind.rule if by_name else kind.mx_rule) if kind.format == "mxfp4" else "even"
        activations = {"format": kind.format, "rule": "absmax" if by_name else kind.rule, "mx_rule": mx_rule} if kind.activations else None
        assert written == {
            "quant_method": "mrgptq", "format": kind.format, "group_size": GROUP[kind.format], "mx_rule": kind.mx_rule, "hadamard_block_size": kind.rotation, "activations": activations, "ignore": unquantised,
        }  # fmt: skip
        for name in SHAPES:
            assert kind.format == "nvfp4" or stored[f"{name}.weight_global_scale"].item() == (3 if kind.thirds else 1)
            assert not (kind.activations and kind.format == "nvfp4") or stored[f"{name}.input_global_scale"].item() == 37.5 + (name == DOWN)
        return
    if kind.dialect == "fp_quant":
        parsed = FPQuantConfig(**{key: value for key, value in written.items() if key != "quant_method"})
        assert {key: getattr(parsed, key) for key in written} == written and parsed.quant_method == written["quant_method"]
        assert (parsed.forward_dtype, parsed.transform_init, parsed.modules_to_not_convert) == (kind.format, "hadamard" if kind.rotation else "identity", unquantised)
        size = kind.rotation or GROUP[kind.format]
        hadamard = deterministic_hadamard_matrix(size, torch.float64) / size**0.5 if kind.rotation else torch.eye(size)
        for name in SHAPES:
            assert all(torch.equal(stored[f"{name}.{way}_hadamard_matrix"], hadamard.bfloat16()) for way in ("forward", "backward"))
            assert stored[f"{name}.act_global_scale"].item() == (37.5 + (name == DOWN) if kind.format == "nvfp4" else 3)
        return
    assert (written["quant_method"], written["quantization_status"], written["format"]) == ("compressed-tensors", "compressed", f"{kind.format}-pack-quantized")
    scheme = QuantizationConfig.model_validate(written)
    assert scheme.ignore == unquantised and scheme.format == written["format"]
    (group,) = scheme.config_groups.values()
    preset = preset_name_to_scheme(kind.format.upper() + ("" if kind.activations else "A16"), ["Linear"])
    assert group.targets == ["Linear"] and group.format == written["format"] and group.output_activations is None
    for ours, theirs in ((group.weights, preset.weights), (group.input_activations, preset.input_activations)):
        keys = ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic", "scale_dtype", "actorder")
        assert (ours is None) == (theirs is None) and all(getattr(ours, key, None) == getattr(theirs, key, None) for key in keys)
    assert set(written["config_groups"]["group_0"]["weights"]) >= {"num_bits", "type", "strategy", "group_size"}
    if not kind.rotation:
        assert written["transform_config"] == {}
        return
    (transform,) = TransformConfig.model_validate(written["transform_config"]).config_groups.values()
    assert (transform.type, transform.head_dim, transform.randomize, transform.precision) == ("hadamard", kind.rotation, False, torch.bfloat16)
    assert {apply.location: (apply.inverse, apply.targets, apply.ignore) for apply in transform.apply} == {"input": (False, ["Linear"], unquantised), "weight_input": (True, ["Linear"], unquantised)}
    for name in SHAPES:
        assert torch.equal(stored[f"{name}.v_input.weight"], deterministic_hadamard_matrix(kind.rotation, torch.bfloat16))


def test_card_and_record(saved):
    kind, tensors, folder, _ = saved
    card, record = (folder / "README.md").read_text(), json.loads((folder / "mrgptq.json").read_text())
    matrix = tensors[f"{Q}.weight"]
    assert kind.dialect in card and kind.format.upper() in card and repr(matrix.recipe) in card
    assert record["dialect"] == kind.dialect and mg.Recipe.from_dict(record["recipe"]) == matrix.recipe
    # all but the seconds, so that the same run gives the same bytes
    assert record["layers"] == {name: {key: value for key, value in tensors[f"{name}.weight"].report.as_dict().items() if key != "seconds"} for name in SHAPES}
    for name in SHAPES:  # {steps from absmax: groups}: plain rounding has absmax's own
        assert record["layers"][name]["scale_offsets"] == {"0": SHAPES[name][0] * SHAPES[name][1] // GROUP[kind.format]} and record["layers"][name]["damped_errors"] == []
    if kind.dialect == "mrgptq":
        assert "Runs in mrgptq alone" in card and "mrgptq evaluate" in card and "vLLM" not in card and "transformers warns" in card and "answers nonsense" in card
        stored_rule = tensors[f"{Q}.weight"].activations.rule if kind.activations else "absmax"
        assert (f'activation scales by "{stored_rule}"' in card) == (stored_rule != "absmax")
        return
    assert "vLLM" in card and "transformers" in card
    if kind.dialect == "compressed-tensors":
        assert all((word in card) == bool(kind.rotation) for word in ("apply_transform_config", "transformers ignores it", f"Hadamard {kind.rotation}"))
    else:
        assert ("both apply the rotation and round" in card) == bool(kind.rotation) and ("both round the activations" in card) != bool(kind.rotation)


@pytest.mark.parametrize("kind", KINDS[2::5], ids=str)
def test_shards_hold_the_same_tensors_under_an_index(kind, tmp_path):
    save(tmp_path / "one", kind)
    save(tmp_path / "many", kind, iter(model(kind).items()), max_shard_bytes=2500)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and [file.name for file in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert index["weight_map"] == {name: file.name for file in files for name in safetensors.torch.load_file(file)}
    one, many = on_disk(tmp_path / "one"), on_disk(tmp_path / "many")
    assert one.keys() == many.keys() and all(torch.equal(one[name].view(torch.uint8), many[name].view(torch.uint8)) for name in one)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    for file in files:
        held = safetensors.torch.load_file(file)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 2500
    loaded, given = mg.load(tmp_path / "many"), model(kind)
    assert all(np.array_equal(loaded[f"{name}.weight"].codes, given[f"{name}.weight"].codes) for name in SHAPES)


NV, MX = Kind("compressed-tensors", "nvfp4", False, None), Kind("compressed-tensors", "mxfp4", True, None)
FOUR_THIRDS = Kind("fp_quant", "mxfp4", True, None)


def weights(*kinds, **changes):
    return {f"{name}.weight": replace(layer(kind, name), **changes) for kind, name in zip(kinds, SHAPES, strict=False)}


REFUSED = {
    "four-thirds weights": (lambda: weights(FOUR_THIRDS), "compressed-tensors", ("four-thirds", "even", "fp_quant")),
    "MX activation rule": (lambda: weights(MX, activations=mg.Activations("mxfp4", "floor")), "compressed-tensors", ("activations", '"even"', '"floor"')),
    "W4A16 in fp_quant": (lambda: weights(NV), "fp_quant", ("W4A4", "W4A16", "nvfp4")),
    "even rule in fp_quant": (lambda: weights(MX), "fp_quant", ('"four-thirds"', '"even"')),
    "rotation 256": (lambda: {f"{DOWN}.weight": layer(Kind("fp_quant", "nvfp4", True, 256), DOWN)}, "fp_quant", ("16, 32, 64, 128", "256")),
    "mxfp4 rotation 16": (lambda: weights(replace(FOUR_THIRDS, rotation=16)), "fp_quant", ("mxfp4", "32, 64, 128", "16")),
    "no input scale": (lambda: weights(NV, activations=mg.Activations("nvfp4")), "compressed-tensors", (Q, "W4A4", "no tensor_scale", "calibrate")),
    "mse activations": (lambda: weights(MX, activations=mg.Activations("mxfp4", rule="mse")), "compressed-tensors", ('"absmax"', '"mse"', 'activation_rule "absmax" or the dialect "mrgptq"')),
    "quest activations": (lambda: weights(MX, activations=mg.Activations("mxfp4", rule="quest")), "compressed-tensors", ('"absmax"', '"quest"', 'the dialect "mrgptq"')),
    "mse activations, NVFP4": (lambda: weights(NV, activations=mg.Activations("nvfp4", tensor_scale=2.0, rule="mse")), "compressed-tensors", ('"absmax"', '"mse"', 'the dialect "mrgptq"')),
    "mse activations, fp_quant": (lambda: weights(FOUR_THIRDS, activations=mg.Activations("mxfp4", "four-thirds", rule="mse")), "fp_quant", ('"absmax"', '"mse"', 'activation_rule "absmax" or the dialect "mrgptq"')),
    "four_over_six activations, fp_quant": (lambda: weights(NV, activations=mg.Activations("nvfp4", tensor_scale=2.0, rule="four_over_six")), "fp_quant", ('"absmax"', '"four_over_six"', 'the dialect "mrgptq"')),
    "no input scale, mrgptq": (lambda: weights(NV, activations=mg.Activations("nvfp4", rule="mse")), "mrgptq", (Q, "W4A4", "no tensor_scale", "calibrate")),
    "two activation searches": (lambda: weights(MX) | {f"{DOWN}.weight": replace(layer(MX, DOWN), activations=mg.Activations("mxfp4", rule="mse"))}, "mrgptq", (Q, DOWN, "activations by mse", "one kind")),
    "no input scale, fp_quant": (lambda: weights(NV, activations=mg.Activations("nvfp4")), "fp_quant", (Q, "W4A4", "no tensor_scale", "calibrate")),
    "two formats": (lambda: weights(NV, MX), "compressed-tensors", (Q, DOWN, "NVFP4 W4A16", "MXFP4 W4A4", "one kind")),
    "two rotations": (lambda: weights(NV, replace(NV, rotation=16)), "compressed-tensors", (Q, DOWN, "Hadamard 16", "one kind")),
    "two MX rules": (lambda: weights(replace(MX, activations=False), replace(MX, dialect="fp_quant", activations=False)), "compressed-tensors", (Q, DOWN, "four-thirds", "one kind")),
    "two activation rules": (lambda: weights(MX) | {f"{DOWN}.weight": replace(layer(MX, DOWN), activations=mg.Activations("mxfp4", "ceil"))}, "compressed-tensors", (Q, DOWN, "activations by ceil", "one kind")),
    "none quantised": (lambda: {"a.weight": np.ones((2, 2), np.float32)}, "compressed-tensors", ("no QuantizedMatrix",)),
    "not called weight": (lambda: {**weights(NV), "model.extra": layer(NV, Q)}, "compressed-tensors", ("'model.extra'", "<module>.weight")),
    "unknown dialect": (lambda: weights(NV), "gguf", ("dialect", "'gguf'", "compressed-tensors, fp_quant, mrgptq")),
}


@pytest.mark.parametrize("streamed", [False, True], ids=["mapping", "iterable"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_a_dialect_cannot_store_is_refused_and_nothing_is_left(case, streamed, tmp_path):
    build, dialect, words = REFUSED[case]
    tensors = {"model.norm.weight": np.ones(4, np.float32), **build()}
    with pytest.raises(ValueError) as refusal:
        mg.save(tmp_path / "out", iter(tensors.items()) if streamed else tensors, dialect, max_shard_bytes=1000)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert list(tmp_path.iterdir()) == []


# ---- The own dialect's configuration, damaged


def changed(path, change):
    """A checkpoint whose quantization_config went through ``change``."""
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


OWN = Kind("mrgptq", "nvfp4", True, 16, "mse")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(format="int4"), ("format is 'int4'", "known: mxfp4, nvfp4")),
        (lambda c: c.pop("format"), ("format is None", "known: mxfp4, nvfp4")),
        (lambda c: c.update(group_size=32), ("group_size is 32", "nvfp4 has 16")),
        (lambda c: c.pop("group_size"), ("group_size is None", "nvfp4 has 16")),
        (lambda c: c.update(format="mxfp4", group_size=32), (".weight_scale is F8_E4M3", "must be a U8 matrix")),
        (lambda c: c["activations"].update(rule="best"), ("unknown rule for nvfp4 'best'", "known: absmax, fpquant_mse, mse, four_over_six")),
        (lambda c: c["activations"].pop("rule"), ("unknown rule for nvfp4 None", "known: absmax")),
        (lambda c: c["activations"].update(rule="quest"), ("unknown rule for nvfp4 'quest'",)),
        (lambda c: c["activations"].update(mx_rule="odd"), ("unknown mx_rule 'odd'", "floor, ceil, even, four-thirds")),
        (lambda c: c["activations"].pop("mx_rule"), ("unknown mx_rule None",)),
        (lambda c: c["activations"].update(format="fp8"), ("activations are", "'fp8'", "whose format is that of the weights")),
        (lambda c: c.update(hadamard_block_size=48), ("block_size is 48", "power of two")),
        (lambda c: c.update(hadamard_block_size=512), ("256 columns", "block size 512")),
    ],
)
def test_a_configuration_that_means_nothing_is_refused_with_its_file_and_layer(change, words, tmp_path):
    save(tmp_path / "out", OWN)
    assert mg.load(tmp_path / "out")[f"{Q}.weight"].activations.rule == "mse"
    changed(tmp_path / "out", change)
    with pytest.raises(ValueError) as refusal:
        mg.load(tmp_path / "out")
    assert all(word in str(refusal.value) for word in (str(tmp_path / "out"), DOWN, *words)), refusal.value  # the first of the file


@pytest.mark.parametrize(
    ("kind", "part", "value", "words"),
    [
        (OWN, "weight_global_scale", None, ("weight_global_scale",)),
        (OWN, "input_global_scale", None, ("input_global_scale",)),
        (replace(OWN, format="mxfp4"), "weight_global_scale", None, ("weight_global_scale",)),
        (OWN, "weight_global_scale", torch.zeros(1), ("weight_global_scale is [0.0]", "one positive number")),
        (OWN, "input_global_scale", torch.tensor([1.0, 2.0]), ("input_global_scale is [1.0, 2.0]", "one positive number")),
        (OWN, "weight_packed", torch.zeros(24, 64), ("weight_packed is F32", "must be a U8 matrix")),
        (OWN, "weight_packed", torch.zeros(24, 32, dtype=torch.uint8), ("do not fit", "one scale for 16 columns")),
    ],
)
def test_a_layer_of_which_a_part_is_missing_or_another_is_refused_by_the_tensor(kind, part, value, words, tmp_path):
    save(tmp_path / "out", kind)
    stored = on_disk(tmp_path / "out")
    del stored[f"{Q}.{part}"]
    if value is not None:
        stored[f"{Q}.{part}"] = value
    safetensors.torch.save_file(stored, tmp_path / "out" / "model.safetensors")
    with pytest.raises((ValueError, KeyError)) as refusal:
        mg.load(tmp_path / "out")
    assert all(word in str(refusal.value) for word in (str(tmp_path / "out"), Q, *words)), refusal.value


def test_a_path_that_exists_is_never_touched(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        with pytest.raises(FileExistsError, match=f"{name} exists already and is not overwritten"):
            mg.save(tmp_path / name, weights(NV))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]
    assert (tmp_path / "file").read_text() == "mine" and list((tmp_path / "folder").iterdir()) == []


def test_no_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    seen = []

    def pairs():
        seen.append("asked")
        yield from weights(NV).items()

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 4999, 4999))
    with pytest.raises(OSError, match="needs 5000 bytes.* only 4999 free") as refusal:
        mg.save(tmp_path / "out", pairs(), expected_bytes=5000)
    assert refusal.value.errno == errno.ENOSPC and seen == [] and list(tmp_path.iterdir()) == []
    mg.save(tmp_path / "out", pairs(), expected_bytes=4999)


def test_side_files_are_copied(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    mg.save(tmp_path / "out", weights(NV), side_files=[tmp_path / "tokenizer.json"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "config.json", "model.safetensors", "mrgptq.json", "tokenizer.json"]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
