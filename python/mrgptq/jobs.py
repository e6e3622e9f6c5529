"""A whole-checkpoint run: plans it, quantises layer by layer, writes the result as it comes."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .arrays import located
from .checkpoint import Scheme, dialect_named, save
from .checkpoint.reader import CheckpointReader
from .checkpoint.stored_tensor import StoredTensor
from .codecs import HESSIAN_SEARCHES, check_groups
from .display import Shown, align, format_bytes
from .formats import block_format
from .gptq import OUTPUT_DAMPING, backward_passes
from .layer import quantize_layer, shared_tensor_scale
from .modules import DEFAULT_IGNORE, DEFAULT_TARGETS, fused_groups, select_modules
from .recipe import Recipe
from .result import LayerReport, QuantizedMatrix, layer_report
from .rotations import rotation_of

_log = logging.getLogger("mrgptq")
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # their layers are transformers' Conv1D

_BATCH_WINDOWS = 8  # calibration windows in one forward pass of a block


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """What a run will do, before it does it; made by :func:`make_plan`.

    Attributes
    ----------
    model, out : pathlib.Path. recipe : Recipe. dialect : str.
    shapes : {module name: (rows, cols)} of the layers that will be quantised, in order.
    tokens, sequence : calibration tokens and window length; 0 for a run without calibration.
    bytes_in, bytes_out : sizes of the weights on disk. memory_bytes : expected peak, without what the imported libraries take themselves.
    """

    model: Path
    out: Path
    recipe: Recipe
    dialect: str
    shapes: dict[str, tuple[int, int]]
    tokens: int
    sequence: int
    bytes_in: int
    bytes_out: int
    memory_bytes: int

    @property
    def calibrated(self) -> bool:
        """Whether the run passes text through the model."""
        return self.tokens > 0

    def layer_table(self) -> str:
        """The layers as aligned text: name, shape, bytes in and out."""
        header = ("layer", "rows", "cols", "on disk")
        rows = [(name, str(r), str(c), format_bytes(_matrix_bytes(self.recipe.format, r, c))) for name, (r, c) in self.shapes.items()]
        return align([header, *rows], numeric=(1, 2, 3))

    def _passes(self) -> str:
        """How often the whole model is passed through backwards; deep and wide models' output Hessians do not fit into memory at once."""
        count = len(_backward_passes(self.shapes)) if self.recipe.output_hessian else 0
        return f", {count} backward pass{'es' if count > 1 else ''} through the model" if count else ""

    def _title(self) -> str:
        return f"{self.model} -> {self.out}"

    def _rows(self) -> list[tuple[str, object]]:
        weights = sum(r * c for r, c in self.shapes.values())
        return [
            ("layers to quantise", f"{len(self.shapes)}, {weights:,} weights"),
            ("scheme", Scheme.of_recipe(self.recipe).label),
            ("dialect", self.dialect),
            ("calibration", f"{self.tokens} tokens in windows of {self.sequence}" + self._passes() if self.calibrated else "none"),
            ("size on disk", f"{format_bytes(self.bytes_in)} -> {format_bytes(self.bytes_out)}"),
            ("expected memory", f"{format_bytes(self.memory_bytes)} and what the libraries take"),
        ]


def _matrix_bytes(format: str, rows: int, cols: int) -> int:
    return rows * (cols // 2 + cols // block_format(format).group_size)


def needs_calibration(recipe: Recipe) -> str | None:
    """Why a recipe cannot do without a calibration text, or None where it can."""
    if recipe.solver == "gptq":
        return 'the solver "gptq" works under the inputs that a calibration text gives each layer'
    if recipe.resolved_scales[0] in HESSIAN_SEARCHES:
        return f'the scales "{recipe.scales}" weigh errors by the inputs that a calibration text gives each layer'
    if recipe.activations == "nvfp4":
        return "W4A4 NVFP4 stores a scale for each layer's inputs, which only a calibration text can give"
    return None


def make_plan(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: Recipe,
    *,
    dialect: str = "compressed-tensors",
    tokens: int = 65536,
    sequence: int = 512,
    calibrated: bool = True,
    targets: str = DEFAULT_TARGETS,
    ignore: str = DEFAULT_IGNORE,
    max_shard_bytes: int = 5_000_000_000,
) -> Plan:
    """Check a run at the door and say what it will do; reads headers only.

    Raises
    ------
    ValueError : a layer whose columns the group or the rotation does not divide, a recipe the dialect cannot store, a missing calibration, by name.
    FileExistsError : ``out`` exists. FileNotFoundError : ``model`` does not.
    """
    out = Path(out)
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists already; it is never overwritten: name another folder or remove it first")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out} cannot be made: the folder {out.absolute().parent} does not exist")
    reason = needs_calibration(recipe)
    if reason and not calibrated:
        raise ValueError(f"the recipe needs a calibration text: {reason}")
    dialect_named(dialect).check(Scheme.of_recipe(recipe))
    reader = CheckpointReader(model)
    if reader.config.get("quantization_config"):
        raise ValueError(f"{model} is quantised already, by {reader.config['quantization_config'].get('quant_method')!r}; quantise the original")
    tensors = {name: reader.shape(name) for name in reader.names}
    shapes = {name: (tensors[f"{name}.weight"][0], tensors[f"{name}.weight"][1]) for name in select_modules(tensors, targets, ignore)}
    for name, (_, cols) in shapes.items():
        check_groups(cols, recipe.format, f"{name}.weight")
        rotation_of(recipe.rotation).check_columns(cols, f"{name}.weight")
    if reader.config.get("model_type") in _TRANSPOSED:
        raise ValueError(f"{model} is a {reader.config['model_type']} model, which stores its layers transposed, (in_features, out_features); only models of ordinary linear layers are read")
    tokens = max(1, tokens // sequence) * sequence if reason else 0  # whole windows; a text that the recipe does not need is not read
    bytes_in = sum(reader.nbytes(name) for name in reader.names)
    kept = bytes_in - sum(reader.nbytes(f"{name}.weight") for name in shapes)
    bytes_out = kept + sum(_matrix_bytes(recipe.format, *shape) for shape in shapes.values())
    memory = _expected_memory(reader, shapes, min(bytes_out, max_shard_bytes), tokens, sequence, twice=recipe.cross > 0, outputs=recipe.output_hessian is not None)
    return Plan(Path(model), out, recipe, dialect, shapes, tokens, sequence, bytes_in, bytes_out, memory)


def _expected_memory(reader: CheckpointReader, shapes: Mapping[str, tuple[int, int]], shard_bytes: int, tokens: int, sequence: int, *, twice: bool, outputs: bool) -> int:
    """Peak bytes: the shard under way, a layer's working copies, and with calibration the float32 model, the tokens' hidden states, one batch inside a block, and
    one block's Hessians and a factor; ``twice``: the original's hidden states, block, cross and stream moments beside them, and two working copies of a cross moment; ``outputs``: the output Hessians of the blocks that share a backward pass, the
    widest one's working copies, and what a window's forward pass leaves for the backward one."""
    widest = max(cols for _, cols in shapes.values())
    largest = max(rows * cols for rows, cols in shapes.values()) * 4
    if not tokens:  # the weight, widened; codes, scales and what the report counts
        return shard_bytes + largest * 3 // 2
    layer = largest * 4
    parameters = sum(int(np.prod(reader.shape(name))) for name in reader.names) * 4
    hidden_size = reader.config.get("hidden_size", min(cols for _, cols in shapes.values()))
    hidden = tokens * hidden_size * 4
    # The MLP holds gate, up, their product and a copy of it; around it lie the residual, its norm, q, k, v and the attention's output. The holes that these leave for each other take as much as three quarters of them again.
    batch = min(tokens, _BATCH_WINDOWS * sequence) * (6 * hidden_size + 4 * widest) * 7
    blocks = _by_block(shapes)
    hessians = max(sum(block[group[0]][1] ** 2 * 8 for group in fused_groups(block)) for block in blocks)
    streams = max(sum(rows * cols for rows, cols in block.values() if rows == hidden_size) for block in blocks) * 8  # at most: not all of these write into the stream
    original = hidden + hessians + streams + max(sum(rows * cols * 4 for rows, cols in block.values()) for block in blocks) if twice else 0
    moments = backward = 0
    if outputs:
        sizes = [sum(8 * rows**2 for rows, _ in block.values()) for block in blocks]
        moments = max(sum(sizes[index] for index in shared) for shared in _backward_passes(shapes)) + 5 * 8 * max(rows for rows, _ in shapes.values()) ** 2
        # A linear layer leaves its input and its output; measured, a softmax over the vocabulary and its gradient hold seven copies of the logits.
        backward = sequence * 4 * (2 * sum(sum(shape) for shape in shapes.values()) + 7 * reader.config.get("vocab_size", 0))
    return shard_bytes + layer + parameters + hidden + max(batch, backward) + hessians + widest**2 * 8 * (3 if twice else 1) + original + moments


def _by_block(shapes: Mapping[str, tuple[int, int]]) -> list[dict[str, tuple[int, int]]]:
    """The layers of each decoder block, blocks in order."""
    blocks: dict[str, dict[str, tuple[int, int]]] = {}
    for name, shape in shapes.items():
        blocks.setdefault(name.split(".layers.")[-1].split(".")[0], {})[name] = shape
    return [blocks[key] for key in sorted(blocks, key=lambda key: (not key.isdigit(), int(key) if key.isdigit() else 0))]


def _backward_passes(shapes: Mapping[str, tuple[int, int]]) -> list[list[int]]:
    return backward_passes([[rows for rows, _ in block.values()] for block in _by_block(shapes)])


def quantize_checkpoint(
    plan: Plan,
    calibration: str | None = None,
    *,
    device: str = "cpu",
    threads: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> dict[str, LayerReport]:
    """Carry out a plan.

    Parameters
    ----------
    plan : Plan. calibration : the text, str, where the plan is calibrated.
    progress : called as progress(stage, done, total); stages "gradients" (windows) and "quantise" (layers).

    Returns
    -------
    dict of module names to LayerReport.
    """
    reader = CheckpointReader(plan.model)
    reports: dict[str, LayerReport] = {}
    if plan.calibrated and calibration is None:
        raise ValueError("calibration is None, but the plan calibrates: pass the text")
    written = dialect_named(plan.dialect).model_config(reader.config)
    for key in ("dtype", "torch_dtype"):
        if written.get(key) != reader.config.get(key, written.get(key)):
            _log.warning("config.json will say %s %s instead of %s: the loaders of %s unpack weights to it", key, written[key], reader.config[key], plan.dialect)
    layers = _calibrated(plan, calibration or "", device, threads, progress) if plan.calibrated else _data_free(plan, reader, threads, progress)

    def tensors() -> Iterator[tuple[str, StoredTensor | QuantizedMatrix]]:
        quantised = {f"{name}.weight" for name in plan.shapes}
        for name in reader.names:
            if name not in quantised:
                yield name, reader.tensor(name)
        for name, matrix in layers:
            reports[name] = report = layer_report(matrix)
            if report.fallback:
                _log.warning("%s: %s", name, report.fallback)
            elif report.damping != report.damping_asked:
                _log.warning("%s: damping raised from %g to %g", name, report.damping_asked, report.damping)
            if report.precision not in (None, plan.recipe.precision):
                _log.warning("%s: computed in %s, since %s could not hold its losses", name, report.precision, plan.recipe.precision)
            if report.output_damping not in (None, OUTPUT_DAMPING):
                _log.warning("%s: the output Hessian's damping raised from %g to %g", name, OUTPUT_DAMPING, report.output_damping)
            yield f"{name}.weight", matrix

    save(plan.out, tensors(), plan.dialect, config=reader.config, side_files=reader.side_files(), max_shard_bytes=max_shard_bytes, expected_bytes=plan.bytes_out)
    return reports


def _data_free(plan: Plan, reader: CheckpointReader, threads: int | None, progress: Callable[[str, int, int], None] | None) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Layers of a recipe that needs no text: read, rounded and given away one group at a time."""
    done = 0
    for group in fused_groups(plan.shapes):
        weights = {name: reader.tensor(f"{name}.weight") for name in group}
        with located(", ".join(f"{name}.weight" for name in group)):
            tensor_scale = shared_tensor_scale(list(weights.values()), plan.recipe, threads=threads)
        for name, weight in weights.items():
            with located(f"{name}.weight"):
                matrix = quantize_layer(weight, None, plan.recipe, tensor_scale=tensor_scale, threads=threads)
            done += 1
            if progress:
                progress("quantise", done, len(plan.shapes))
            yield name, matrix


def _calibrated(plan: Plan, text: str, device: str, threads: int | None, progress: Callable[[str, int, int], None] | None) -> Iterator[tuple[str, QuantizedMatrix]]:
    try:
        from . import hf
    except ImportError as error:
        raise ImportError(f"calibration runs the model with torch and transformers, which are not installed ({error.name}): pip install 'mrgptq[hf]'") from error
    if threads:
        hf.use_threads(threads)
    inputs = hf.token_windows(hf.load_tokenizer(plan.model), text, plan.tokens // plan.sequence, plan.sequence)
    if inputs.numel() < plan.tokens:
        _log.warning("the calibration text has only %d of the %d tokens asked for", inputs.numel(), plan.tokens)
    model = hf.load_model(plan.model, device=device)
    yield from hf.calibrate(model, inputs, plan.recipe, list(plan.shapes), batch_windows=_BATCH_WINDOWS, threads=threads, progress=progress)


def with_rotation(recipe: Recipe, block_size: int | None) -> Recipe:
    """The recipe with another rotation: a block size, 0 for none, None for its own."""
    return recipe if block_size is None else replace(recipe, rotation=block_size or None)
