"""What a run over a checkpoint will do, before it does it: layers, sizes, memory, refusals."""

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .checkpoint import Scheme, check_layer, dialect_named
from .checkpoint.card import RECORD_NAME
from .checkpoint.hessians import INDEX_NAME, StoredHessians, check_new
from .checkpoint.partial_run import is_finished
from .checkpoint.reader import CheckpointReader
from .checkpoint.safetensors import shown
from .codecs import HESSIAN_SEARCHES
from .display import Shown, align, format_bytes
from .formats import block_format
from .gptq import backward_passes
from .modules import DEFAULT_IGNORE, DEFAULT_TARGETS, fused_groups, select_modules
from .recipe import Recipe

_log = logging.getLogger("mrgptq")

_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # their layers are transformers' Conv1D

BATCH_WINDOWS = 8  # calibration windows in one forward pass of a block
RESIDENT_BYTES = 2 << 30
"""Models of no more in float32 are held whole while they are calibrated; of others one block is in memory at a time. A fixed bound, so that the machine's memory does not decide bytes."""
_STREAMED = ("deepseek_v3", "gemma2", "gemma3_text", "glm4_moe", "llama", "mistral", "mixtral", "olmo", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
"""Models (model_type) whose checkpoints name tensors as transformers does, so that blocks can be read one by one; tried. Others are held whole, whatever their size."""
HELD_BYTES = 4 << 30  # of hidden states between blocks, in a backward pass that goes block by block; see hf.fisher


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """What a run will do, before it does it; made by :func:`make_plan`.

    Attributes
    ----------
    model, out : pathlib.Path. recipe : Recipe. dialect : str.
    shapes : {module name: (rows, cols)} of the layers that will be quantised, in order.
    tokens, sequence : calibration tokens and window length; 0 for a run without calibration.
    bytes_in, bytes_out : sizes of the weights on disk. memory_bytes : expected peak, without what the imported libraries take themselves; of this process, which without a text holds nothing where an executor quantises.
    max_shard_bytes : a file of the result is closed before it grows beyond that. hessians : folder of stored Hessians, None without.
    finished : ``out`` is there, written by this very run, which was cut short before it could say so.
    model_bytes : of the model in float32. kept_bytes : on disk beside the result while the run lasts: the layers as they are done, and what it would go on from.
    streamed : whether calibration holds one block of the model at a time.
    worker_bytes, moments_bytes : where an executor quantises, the expected peak of each worker, and what a text's moments take on disk beside ``kept_bytes``, for workers to read.
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
    max_shard_bytes: int = 5_000_000_000
    hessians: Path | None = None
    finished: bool = False
    model_bytes: int = 0
    kept_bytes: int = 0
    streamed: bool = False
    worker_bytes: int = 0
    moments_bytes: int = 0

    def memory_of(self, workers: int) -> int:
        """Expected peak of all processes, with so many workers; 0 for a run without an executor."""
        return (self.memory_bytes if self.calibrated or not workers else 0) + workers * self.worker_bytes

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

    def _scheme(self) -> str:
        """The scheme, and how many layers are rotated in smaller blocks or padded."""
        fits = [self.recipe.fit(cols, name) for name, (_, cols) in self.shapes.items()]
        sizes = Counter(rotation.block_size for _, rotation in fits if rotation.block_size != self.recipe.rotation)
        parts = [Scheme.of_recipe(self.recipe).label, *(f"{count} layers by Hadamard {size}" for size, count in sizes.items())]
        if padded := sum(padding > 0 for padding, _ in fits):
            parts.append(f"{padded} layers with columns of zeros added")
        return "; ".join(parts)

    def _title(self) -> str:
        return f"{self.model} -> {self.out}"

    def _rows(self) -> list[tuple[str, object]]:
        weights = sum(r * c for r, c in self.shapes.values())
        return [
            ("layers to quantise", f"{len(self.shapes)}, {weights:,} weights"),
            ("scheme", self._scheme()),
            ("dialect", self.dialect),
            ("calibration", f"{self.tokens} tokens in windows of {self.sequence}" + self._passes() if self.calibrated else f"Hessians of {self.hessians}" if self.hessians else "none"),
            ("size on disk", f"{format_bytes(self.bytes_in)} -> {format_bytes(self.bytes_out)}, and {format_bytes(self.kept_bytes)} more while it runs"),
            ("expected memory", _expected_memory(self.memory_bytes, self.streamed)),
            ("with workers", f"{format_bytes(self.worker_bytes)}{' more' if self.calibrated else ''} in each" + (f", {format_bytes(self.moments_bytes)} more on disk" if self.moments_bytes else "")),
        ]


@dataclass(frozen=True, repr=False)
class CalibrationPlan(Shown):
    """What ``mrgptq calibrate`` will do, before it does it; made by :func:`plan_calibration`. Fields as those of :class:`Plan`; ``bytes_out``: of the Hessians on disk, at most; ``kept_bytes``: of what it would go on from, beside them."""

    model: Path
    out: Path
    shapes: dict[str, tuple[int, int]]
    tokens: int
    sequence: int
    bytes_out: int
    memory_bytes: int
    model_bytes: int
    kept_bytes: int
    streamed: bool
    finished: bool = False

    def _title(self) -> str:
        return f"{self.model} -> {self.out}"

    def _rows(self) -> list[tuple[str, object]]:
        return [
            ("layers to observe", len(self.shapes)),
            ("calibration", f"{self.tokens} tokens in windows of {self.sequence}"),
            ("size on disk", f"{format_bytes(self.bytes_out)}, and {format_bytes(self.kept_bytes)} more while it runs"),
            ("expected memory", _expected_memory(self.memory_bytes, self.streamed)),
        ]


def _expected_memory(memory_bytes: int, streamed: bool) -> str:
    return f"{format_bytes(memory_bytes)}{', one block of the model at a time,' if streamed else ''} and what the libraries take"


def _matrix_bytes(format: str, rows: int, cols: int) -> int:
    group_size = block_format(format).group_size
    groups = -(-cols // group_size)
    return rows * groups * (group_size // 2 + 1)


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
    hessians: str | os.PathLike[str] | None = None,
) -> Plan:
    """Check a run at the door and say what it will do; reads headers only.

    Parameters
    ----------
    hessians : folder of stored Hessians (``mrgptq calibrate``, :func:`mrgptq.save_hessians`) in place of a calibration text. They hold the inputs' moments in the original model alone: recipes with ``cross`` or
        ``output_hessian`` and W4A4 NVFP4 need the text.

    Raises
    ------
    ValueError : a layer whose columns no group divides, unless the recipe pads and the dialect stores that; a recipe the dialect cannot store, a missing calibration or Hessian, by name.
    FileExistsError : ``out`` exists. FileNotFoundError : ``model`` does not.
    """
    out = Path(out)
    finished = is_finished(out, RECORD_NAME)
    if os.path.lexists(out) and not finished:
        whole = ", a whole checkpoint that a run ended with" if (out / RECORD_NAME).is_file() else ""
        raise FileExistsError(f"{out} exists already{whole}; it is never overwritten: name another folder or remove it first")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out} cannot be made: the folder {out.absolute().parent} does not exist")
    reason = needs_calibration(recipe)
    stored = None
    if hessians is not None:
        _check_hessians_suffice(recipe)
        stored, reason = StoredHessians(hessians), None
    elif reason and not calibrated:
        raise ValueError(f"the recipe needs a calibration text: {reason}")
    dialect_named(dialect).check(Scheme.of_recipe(recipe))
    reader, shapes = original_layers(model, targets, ignore)
    fits = {name: recipe.fit(cols, f"{name}.weight") for name, (_, cols) in shapes.items()}
    if recipe.rotation:
        recipe = replace(recipe, rotation=max(rotation.block_size or 0 for _, rotation in fits.values()))  # where no layer takes the one asked the same codes come of the largest that one takes
    for name, (padding, rotation) in fits.items():
        check_layer(dialect_named(dialect), name, padding, rotation.block_size, recipe.rotation)
        if beside := [part for part in dialect_named(dialect).parts(name) if part in reader]:
            raise ValueError(f"{model} has a tensor {shown(beside[0])}, which is what {dialect} calls a part of {shown(name)} once it is quantised")
        if stored is not None and name not in stored:
            raise ValueError(f"{hessians} holds no Hessian of {name}; it was made of another model or other modules: leave the layer out with ignore, or calibrate it")
        if stored is not None and stored.cols(name) != (cols := shapes[name][1]):
            raise ValueError(f"{stored.file(name)} is of {stored.cols(name)} columns; {name} has {cols}: it was made of another model")
    if stored is not None:
        for first, *others in fused_groups(shapes):
            for other in others:
                if not stored.same(first, other):
                    raise ValueError(f"{first} and {other} read one input, but {hessians} holds different Hessians of them; calibrate both on one text")
    tokens = _whole_windows(tokens, sequence) if reason else 0  # a text that the recipe does not need is not read
    bytes_in = sum(reader.nbytes(name) for name in reader.names)
    kept = bytes_in - sum(reader.nbytes(f"{name}.weight") for name in shapes)
    bytes_out = kept + sum(_matrix_bytes(recipe.format, *shape) for shape in shapes.values())
    model_bytes = _float32_bytes(reader, reader.names)
    streamed = tokens > 0 and _is_streamed(reader, model_bytes)
    worker = memory = _task_memory(shapes, recipe, hessians=stored is not None or tokens > 0, text=tokens > 0)
    if tokens:
        memory = _calibrating_memory(reader, shapes, tokens, sequence, streamed=streamed, twice=recipe.cross > 0, outputs=recipe.output_hessian is not None)
    moments = max(_moments_bytes(block, recipe, _hidden_size(reader, shapes)) for block in _by_block(shapes)) if tokens else 0
    return Plan(Path(model), out, recipe, dialect, shapes, tokens, sequence, bytes_in, bytes_out, memory, max_shard_bytes, None if stored is None else stored.path, finished, model_bytes, _kept_bytes(reader, shapes, recipe, tokens), streamed, worker, moments)


def plan_calibration(
    model: str | os.PathLike[str], out: str | os.PathLike[str], *, tokens: int = 65536, sequence: int = 512, targets: str = DEFAULT_TARGETS, ignore: str = DEFAULT_IGNORE
) -> CalibrationPlan:
    """Check at the door whether a text can pass through ``model`` for Hessians in ``out``, and say what that takes; reads headers only. Raises what :func:`make_plan` raises of both."""
    out = Path(out)
    if not (finished := is_finished(out, INDEX_NAME)):
        check_new(out)
    reader, shapes = original_layers(model, targets, ignore)
    tokens, model_bytes = _whole_windows(tokens, sequence), _float32_bytes(reader, reader.names)
    streamed = _is_streamed(reader, model_bytes)
    memory = _calibrating_memory(reader, shapes, tokens, sequence, streamed=streamed, twice=False, outputs=False, quantised=False)
    stored = sum(_stored_hessian_bytes(shapes[group[0]][1]) for group in fused_groups(shapes))
    kept = 2 * 4 * tokens * _hidden_size(reader, shapes)  # the next block's inputs, twice while a new file takes the old one's place
    return CalibrationPlan(Path(model), out, shapes, tokens, sequence, stored, memory, model_bytes, kept, streamed, finished)


def original_layers(model: str | os.PathLike[str], targets: str = DEFAULT_TARGETS, ignore: str = DEFAULT_IGNORE) -> tuple[CheckpointReader, dict[str, tuple[int, int]]]:
    """A model's checkpoint, and the shapes of its layers; ValueError where it is quantised or stores them otherwise."""
    reader = CheckpointReader(model)
    if reader.config.get("quantization_config"):
        raise ValueError(f"{model} is quantised already, by {reader.config['quantization_config'].get('quant_method')!r}; quantise the original")
    tensors = {name: reader.shape(name) for name in reader.names}
    shapes = {name: (tensors[f"{name}.weight"][0], tensors[f"{name}.weight"][1]) for name in select_modules(tensors, targets, ignore)}
    if fused := [name for name, shape in tensors.items() if len(shape) > 2 and re.search(targets, name) and not (ignore and re.search(ignore, name))]:
        _log.warning("%s has %d tensors of rank 3 or more where layers are quantised, such as %s; only matrices are quantised, so they stay as they are", model, len(fused), shown(fused[0]))
    if reader.config.get("model_type") in _TRANSPOSED:
        raise ValueError(f"{model} is a {reader.config['model_type']} model, which stores its layers transposed, (in_features, out_features); only models of ordinary linear layers are read")
    return reader, shapes


def _whole_windows(tokens: int, sequence: int) -> int:
    return max(1, tokens // sequence) * sequence


def _is_streamed(reader: CheckpointReader, model_bytes: int) -> bool:
    return model_bytes > RESIDENT_BYTES and reader.config.get("model_type") in _STREAMED


def _check_hessians_suffice(recipe: Recipe) -> None:
    """Refuse what stored Hessians cannot serve."""
    if recipe.cross:
        raise ValueError(f"the recipe has cross {recipe.cross:g}, which needs both models at work; stored Hessians serve cross 0: replace(recipe, cross=0), --cross 0")
    if recipe.output_hessian:
        raise ValueError(f"the recipe has output_hessian {recipe.output_hessian!r}, which needs backward passes; stored Hessians serve output_hessian None: replace(recipe, output_hessian=None), --output-hessian none")
    if recipe.activations == "nvfp4":
        raise ValueError("W4A4 NVFP4 stores a scale for each layer's inputs, which stored Hessians do not tell: give the calibration text")


def _task_memory(shapes: Mapping[str, tuple[int, int]], recipe: Recipe, *, hessians: bool, text: bool) -> int:
    """Peak bytes of a task, of a run that goes from one to the next and of a worker: a weight, widened, and what the report counts; codes and scales of those that share its input; with ``hessians`` theirs, its factor and
    the solver's rows in hand; after a ``text`` also a working copy of a cross moment, and the layers' output Hessians with two working copies of one. Measured, one task with all of it takes three quarters of that."""
    most = 0
    for group in fused_groups(shapes):
        cols, rows = shapes[group[0]][1], [shapes[name][0] for name in group]
        task = max(rows) * cols * 4 * (4 if hessians else 1.5) + sum(_matrix_bytes(recipe.format, count, cols) for count in rows)
        task += 8 * cols**2 * (3 if text and recipe.cross else 2) if hessians else 0
        task += 8 * (sum(count**2 for count in rows) + 2 * max(rows) ** 2) if text and recipe.output_hessian else 0
        most = max(most, int(task))
    return most


def _calibrating_memory(reader: CheckpointReader, shapes: Mapping[str, tuple[int, int]], tokens: int, sequence: int, *, streamed: bool, twice: bool, outputs: bool, quantised: bool = True) -> int:
    """Peak bytes: a layer's working copies where layers are ``quantised``, the float32 model, the tokens' hidden states, one batch inside a block, and
    one block's Hessians and a factor; ``twice``: the original's hidden states, block, cross and stream moments beside them, and two working copies of a cross moment; ``outputs``: the output Hessians of the blocks that share a backward pass, the
    widest one's working copies, and what a window's forward pass leaves for the backward one."""
    widest = max(cols for _, cols in shapes.values())
    largest = max(rows * cols for rows, cols in shapes.values()) * 4
    layer = largest * 4 if quantised else 0
    parameters = _float32_bytes(reader, reader.names)
    if streamed:  # what lies outside the blocks, and one block, whose tensors are widened one by one
        by_block: dict[str, list[str]] = {}
        for name in reader.names:
            by_block.setdefault(numbered[0] if (numbered := re.match(r".*?\.\d+\.", name)) else "", []).append(name)
        parameters = _float32_bytes(reader, by_block.pop("", [])) + max((_float32_bytes(reader, names) for names in by_block.values()), default=0)
    hidden_size = _hidden_size(reader, shapes)
    hidden = tokens * hidden_size * 4
    # The MLP holds gate, up, their product and a copy of it; around it lie the residual, its norm, q, k, v and the attention's output. The holes that these leave for each other take as much as three quarters of them again.
    batch = min(tokens, BATCH_WINDOWS * sequence) * (6 * hidden_size + 4 * widest) * 7
    blocks = _by_block(shapes)
    hessians = max(sum(block[group[0]][1] ** 2 * 8 for group in fused_groups(block)) for block in blocks)
    streams = max(sum(rows * cols for rows, cols in block.values() if rows == hidden_size) for block in blocks) * 8  # at most: not all of these write into the stream
    original = hidden + hessians + streams + max(sum(rows * cols * 4 for rows, cols in block.values()) for block in blocks) if twice else 0
    moments = backward = 0
    if outputs:
        sizes = [sum(8 * rows**2 for rows, _ in block.values()) for block in blocks]
        moments = max(sum(sizes[index] for index in shared) for shared in _backward_passes(shapes)) + 5 * 8 * max(rows for rows, _ in shapes.values()) ** 2
        # A linear layer leaves its input and its output; measured, a softmax over the vocabulary and its gradient hold seven copies of the logits.
        logits = 7 * (reader.config.get("vocab_size") or 0)
        if streamed:  # the blocks' inputs, and the gradients of one, of as many windows as go at once
            window = sequence * hidden_size * 4 * (len(blocks) + 2)
            backward = sequence * 4 * (2 * max(sum(sum(shape) for shape in block.values()) for block in blocks) + logits) + window * max(1, min(tokens // sequence, HELD_BYTES // window))
        else:
            backward = sequence * 4 * (2 * sum(sum(shape) for shape in shapes.values()) + logits)
    return layer + parameters + hidden + max(batch, backward) + hessians + widest**2 * 8 * (3 if twice else 1) + original + moments


def _kept_bytes(reader: CheckpointReader, shapes: Mapping[str, tuple[int, int]], recipe: Recipe, tokens: int) -> int:
    """The layers; with calibration the next block's inputs, and the triangles of the output Hessians, each twice while a new file takes an old one's place."""
    layers = sum(_matrix_bytes(recipe.format, *shape) for shape in shapes.values())
    if not tokens:
        return layers
    hidden = 4 * tokens * _hidden_size(reader, shapes) * (2 if recipe.cross else 1)
    outputs = 0
    if recipe.output_hessian:
        sizes = [sum(_stored_hessian_bytes(rows) for rows, _ in block.values()) for block in _by_block(shapes)]
        outputs = max(sum(sizes[index] for index in shared) for shared in _backward_passes(shapes))
    return layers + 2 * (hidden + outputs)


def _stored_hessian_bytes(cols: int) -> int:
    """At most: the triangle, and the panel under way."""
    return 4 * cols * (cols + 1) + 4 * 256 * cols


def _moments_bytes(block: Mapping[str, tuple[int, int]], recipe: Recipe, hidden_size: int) -> int:
    """What is written of a block for workers, at most: Hessians, cross moments and those of the stream, output Hessians."""
    cols = [block[group[0]][1] for group in fused_groups(block)]
    hessians = sum(map(_stored_hessian_bytes, cols))
    cross = sum(8 * c**2 for c in cols) + sum(8 * r * c for r, c in block.values() if r == hidden_size) if recipe.cross else 0
    outputs = sum(_stored_hessian_bytes(rows) for rows, _ in block.values()) if recipe.output_hessian else 0
    return hessians + cross + outputs


def _hidden_size(reader: CheckpointReader, shapes: Mapping[str, tuple[int, int]]) -> int:
    return reader.config.get("hidden_size") or min(cols for _, cols in shapes.values())


def _float32_bytes(reader: CheckpointReader, names: Iterable[str]) -> int:
    return 4 * sum(math.prod(reader.shape(name)) for name in names)


def _by_block(shapes: Mapping[str, tuple[int, int]]) -> list[dict[str, tuple[int, int]]]:
    """The layers of each decoder block, blocks in order."""
    blocks: dict[str, dict[str, tuple[int, int]]] = {}
    for name, shape in shapes.items():
        blocks.setdefault(name.split(".layers.")[-1].split(".")[0], {})[name] = shape
    return [blocks[key] for key in sorted(blocks, key=lambda key: (0, int(key)) if re.fullmatch("[0-9]{1,9}", key) else (1, 0))]


def _backward_passes(shapes: Mapping[str, tuple[int, int]]) -> list[list[int]]:
    return backward_passes([[rows for rows, _ in block.values()] for block in _by_block(shapes)])


def with_rotation(recipe: Recipe, block_size: int | None) -> Recipe:
    """The recipe with another rotation: a block size, 0 for none, None for its own."""
    return recipe if block_size is None else replace(recipe, rotation=block_size or None)
