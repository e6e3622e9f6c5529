"""One task of a run: layers that share an input, quantised by whichever process gets them, into a file of their own."""

import json
import logging
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from numpy.typing import NDArray

from .arrays import as_scale, located
from .checkpoint.hessians import hessian_of, hessian_tensors
from .checkpoint.partial_run import write_part
from .checkpoint.reader import CheckpointReader
from .checkpoint.safetensors import SafetensorsFile, parse_json_object, shown, write_file
from .checkpoint.stored_tensor import StoredTensor
from .gptq import OUTPUT_DAMPING, Hessian
from .group import Moments, quantize_together
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
    moments : file of what is known of them, as :func:`write_moments` or :func:`mrgptq.save_hessians` wrote it; None where the recipe needs nothing. threads : of the worker; None is its default.
    """

    model: Path
    modules: tuple[str, ...]
    recipe: Recipe
    part: Path
    moments: Path | None = None
    threads: int | None = None


def quantize_group(task: GroupTask) -> Path:
    """Carry a task out: its file, which appears whole. Done twice, even at once, it gives the same layers; the seconds in their reports are of the last time."""
    reader = CheckpointReader(task.model)
    weights = {name: reader.tensor(f"{name}.weight") for name in task.modules}
    write_matrices(task.part, dict(quantize_together(weights, read_moments(task.moments) if task.moments else Moments(), task.recipe, threads=task.threads)))
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


def run_tasks(tasks: Iterable[GroupTask], executor: Executor | None, done: Callable[[GroupTask], None]) -> None:
    """Carry tasks out, here or by an executor, which has each as soon as ``tasks`` yields it; ``done`` is called here after each, in any order. The first that fails ends the rest: what waits is cancelled, and no one looks at what still runs."""
    if executor is None:
        for task in tasks:
            quantize_group(task)
            done(task)
        return
    futures: dict[Future[Path], GroupTask] = {}
    try:
        for task in tasks:
            futures[executor.submit(quantize_group, task)] = task
        for future in as_completed(futures):
            future.result()
            done(futures[future])
    finally:
        for future in futures:
            future.cancel()


def write_moments(path: Path, moments: Moments) -> None:
    """Write what is known of layers for the task that will quantise them: a stored Hessian's file, and beside it all else, to the bit."""
    tensors: dict[str, NDArray[Any]] = hessian_tensors(cast(Hessian, moments.hessian))
    if moments.cross is not None:
        tensors["cross"] = moments.cross
    tensors |= {f"{name}.stream": stream for name, stream in moments.streams.items()}
    tensors |= {f"{name}.output.{what}": tensor for name, hessian in moments.output_hessians.items() for what, tensor in hessian_tensors(hessian).items()}
    write_file(path, tensors, {"activations": json.dumps(asdict(moments.activations))} if moments.activations else None)


def read_moments(path: Path) -> Moments:
    """What :func:`write_moments` wrote, or of a stored Hessian's file that alone; ValueError names the file."""
    file = SafetensorsFile(path)
    ending, output = ".stream", ".output.tokens"
    streams = {name.removesuffix(ending): file.tensor(name).bits for name in file.names if name.endswith(ending)}
    outputs = {name.removesuffix(output): hessian_of(file, name.removesuffix("tokens")) for name in file.names if name.endswith(output)}
    activations = Activations(**json.loads(file.metadata["activations"])) if "activations" in file.metadata else None
    return Moments(hessian_of(file), file.tensor("cross").bits if "cross" in file else None, streams, outputs, activations)


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
    """(module, QuantizedMatrix) of a part, arrays mapped from the file. ``recipe``: what they were made by. ValueError names the file where it is not as :func:`write_matrices` left it."""
    file = SafetensorsFile(part)
    for name, layer in parse_json_object(file.metadata.get("layers", "").encode(), f"the list of layers in {part}").items():
        with located(str(part)):
            try:
                codes, scales = (file.tensor(f"{name}.{what}").bits for what in ("codes", "scales"))
                activations = None if layer["activations"] is None else Activations(**layer["activations"])
                report, divisor = LayerReport.from_dict(layer["report"]), as_scale(layer["tensor_scale"], "tensor_scale")
                matrix = QuantizedMatrix(layer["format"], codes, scales, divisor, rotation_of(layer["rotation"]), activations, recipe, report, padding=layer["padding"])
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{shown(name)} is not described as a run describes its layers ({type(error).__name__}: {error}); remove the folder to begin anew") from None
            if matrix.shape != (report.rows, report.cols):
                raise ValueError(f"{shown(name)} has codes of {matrix.shape[0]} x {matrix.shape[1]}, its report is of {report.rows} x {report.cols}; remove the folder to begin anew")
        yield name, matrix


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
