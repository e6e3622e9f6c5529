"""One task of a run: layers that share an input, quantised by whichever process gets them, into a file of their own."""

import json
import logging
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .arrays import located
from .checkpoint.hessians import read_hessian
from .checkpoint.partial_run import write_part
from .checkpoint.reader import CheckpointReader
from .checkpoint.safetensors import SafetensorsFile, parse_json_object
from .checkpoint.stored_tensor import StoredTensor
from .gptq import OUTPUT_DAMPING
from .layer import make_factor, quantize_layer, shared_tensor_scale
from .recipe import Recipe
from .result import Activations, LayerReport, QuantizedMatrix, layer_report
from .rotations import rotation_of

_log = logging.getLogger("mrgptq")


@dataclass(frozen=True)
class GroupTask:
    """Layers that share an input: names and places, no arrays, so that it travels to any process that sees the same files.

    Attributes
    ----------
    model : the checkpoint. modules : names. recipe : Recipe. part : the file to write.
    hessian : file of their inputs' Hessian, None where the recipe needs none. threads : of the worker; None is its default.
    """

    model: Path
    modules: tuple[str, ...]
    recipe: Recipe
    part: Path
    hessian: Path | None = None
    threads: int | None = None


def quantize_group(task: GroupTask) -> Path:
    """Carry a task out: its file, which appears whole. Done twice, even at once, it gives the same bytes."""
    reader = CheckpointReader(task.model)
    weights = {name: reader.tensor(f"{name}.weight") for name in task.modules}
    with located(", ".join(f"{name}.weight" for name in weights)):
        tensor_scale = shared_tensor_scale(list(weights.values()), task.recipe, threads=task.threads)
    hessian = None if task.hessian is None else read_hessian(task.hessian)
    factor = None
    if hessian is not None and task.recipe.solver == "gptq":
        with located(str(task.hessian)):
            factor = make_factor(hessian, task.recipe, threads=task.threads)
        hessian = None  # the factor has all that is needed of it
    matrices = {}
    for name, weight in weights.items():
        with located(f"{name}.weight"):
            matrices[name] = quantize_layer(weight, hessian, task.recipe, tensor_scale=tensor_scale, factor=factor, threads=task.threads)
    write_matrices(task.part, matrices)
    return task.part


def end_with_parent() -> None:
    """For a worker process: it ends when the one that started it does, however that came about."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch(sentinel: int) -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def run_tasks(tasks: Sequence[GroupTask], executor: Executor | None, done: Callable[[GroupTask], None]) -> None:
    """Carry tasks out, here or by an executor, in any order; ``done`` is called here after each. The first that fails ends the rest: what waits is cancelled, what runs is waited for."""
    if executor is None:
        for task in tasks:
            quantize_group(task)
            done(task)
        return
    futures: dict[Future[Path], GroupTask] = {executor.submit(quantize_group, task): task for task in tasks}
    try:
        for future in as_completed(futures):
            future.result()
            done(futures[future])
    finally:
        for future in futures:
            future.cancel()


def write_matrices(part: Path, matrices: Mapping[str, QuantizedMatrix]) -> None:
    """Write quantised layers as a part of a run."""
    tensors: dict[str, StoredTensor] = {}
    layers: dict[str, Any] = {}
    for name, matrix in matrices.items():
        tensors[f"{name}.codes"], tensors[f"{name}.scales"] = StoredTensor.from_bits("U8", matrix.codes), StoredTensor.from_bits("U8", matrix.scales)
        activations = None if matrix.activations is None else asdict(matrix.activations)
        layers[name] = {"format": matrix.format, "tensor_scale": matrix.tensor_scale, "rotation": matrix.rotation.block_size, "padding": matrix.padding, "activations": activations, "report": layer_report(matrix).as_dict()}
    write_part(part, tensors, {"layers": json.dumps(layers, ensure_ascii=False)})


def read_matrices(part: Path, recipe: Recipe) -> Iterator[tuple[str, QuantizedMatrix]]:
    """(module, QuantizedMatrix) of a part, arrays mapped from the file. ``recipe``: what they were made by."""
    file = SafetensorsFile(part)
    for name, layer in parse_json_object(file.metadata.get("layers", "").encode(), f"the list of layers in {part}").items():
        with located(str(part)):
            codes, scales = (file.tensor(f"{name}.{what}").bits for what in ("codes", "scales"))
            activations = None if layer["activations"] is None else Activations(**layer["activations"])
            yield name, QuantizedMatrix(layer["format"], codes, scales, layer["tensor_scale"], rotation_of(layer["rotation"]), activations, recipe, LayerReport.from_dict(layer["report"]), padding=layer["padding"])


def log_report(name: str, report: LayerReport, recipe: Recipe) -> None:
    """Warn of what was done instead of what the recipe asked."""
    if report.fallback:
        _log.warning("%s: %s", name, report.fallback)
    elif report.damping != report.damping_asked:
        _log.warning("%s: damping raised from %g to %g", name, report.damping_asked, report.damping)
    if report.precision not in (None, recipe.precision):
        _log.warning("%s: computed in %s, since %s could not hold its losses", name, report.precision, recipe.precision)
    if report.output_damping not in (None, OUTPUT_DAMPING):
        _log.warning("%s: the output Hessian's damping raised from %g to %g", name, OUTPUT_DAMPING, report.output_damping)
