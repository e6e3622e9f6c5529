"""A whole-checkpoint run: tasks that are done in any order, by any process, each kept as it is done; then the checkpoint from them."""

import errno
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any, cast

from numpy.typing import NDArray

from .checkpoint import dialect_named, save
from .checkpoint.card import RECORD_NAME
from .checkpoint.hessians import StoredHessians, hessian_of, hessian_tensors, stored_cols, write_index
from .checkpoint.partial_run import PartialRun, write_part
from .checkpoint.reader import CheckpointReader, read_json_object
from .checkpoint.safetensors import SafetensorsFile
from .checkpoint.stored_tensor import StoredTensor
from .checkpoint.writer import publish
from .display import format_bytes
from .gptq import Hessian
from .group import Moments
from .identity import identity_of
from .modules import fused_groups
from .plan import BATCH_WINDOWS, CalibrationPlan, Plan
from .recipe import Recipe
from .result import LayerReport, QuantizedMatrix, layer_report
from .tasks import GroupTask, log_report, read_matrices, run_tasks, write_matrices, write_moments

_log = logging.getLogger("mrgptq")

Progress = Callable[[str, int, int], None]


def quantize_checkpoint(
    plan: Plan,
    calibration: str | None = None,
    *,
    device: str = "cpu",
    threads: int | None = None,
    executor: Executor | None = None,
    worker_threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, LayerReport]:
    """Carry out a plan. Each group of layers that share an input is kept as it is done, in the hidden folder ``.OUT.partial``; where the run is cut short, by whatever, the same call goes on from there
    and gives the bytes that it would have given at once. The output appears whole or not at all, and the folder goes with it.

    Parameters
    ----------
    plan : Plan. calibration : the text, str, where the plan is calibrated.
    device : torch's, of the forward passes. threads : of this process; None follows OMP_NUM_THREADS.
    executor : any ``concurrent.futures.Executor`` whose workers see the same files, such as a ProcessPoolExecutor started by spawn, ``dask.distributed.Client.get_executor()``, ``mpi4py.futures.MPIPoolExecutor``.
        It quantises; a text passes through the model here, from block to block, and a block's layers are then quantised side by side. None works here. The bytes do not depend on it, so what was begun with one may be finished without, or by another.
    worker_threads : of each worker; None is its own default.
    progress : called as progress(stage, done, total); stages "gradients" (windows) and "quantise" (layers, those of an earlier run included).

    Returns
    -------
    dict of module names to LayerReport.

    Raises
    ------
    ValueError : what an earlier run left was begun with another model, recipe, text, version, number of threads or setting of torch's sums; the difference is named. BlockingIOError : another process works on it.
    OSError : no space, with the file's name.
    """
    if plan.calibrated and calibration is None:
        raise ValueError("calibration is None, but the plan calibrates: pass the text")
    reader = CheckpointReader(plan.model)
    target = dialect_named(plan.dialect)
    written = target.model_config(reader.config)
    for key in ("dtype", "torch_dtype"):
        if written.get(key) != reader.config.get(key, written.get(key)):
            _log.warning("config.json will say %s %s instead of %s: the loaders of %s unpack weights to it", key, written[key], reader.config[key], plan.dialect)
    side_files = reader.side_files()  # one that vanishes meanwhile is missed
    with _partial_run(plan, reader, calibration, device, threads) as run:
        if plan.finished:
            return {name: LayerReport.from_dict(report) for name, report in read_json_object(plan.out / RECORD_NAME)["layers"].items()}
        parts = {group: run.part(f"{number:05d}") for number, group in enumerate(fused_groups(plan.shapes))}
        noted: list[str] = []

        def note(group: tuple[str, ...]) -> None:
            matrices = dict(read_matrices(parts[group], plan.recipe))
            if {name: matrix.shape for name, matrix in matrices.items()} != {name: plan.shapes[name] for name in group}:
                raise ValueError(f"{parts[group]} holds other layers than {', '.join(group)} of this model; remove the folder to begin anew")
            for name, matrix in matrices.items():
                log_report(name, layer_report(matrix), plan.recipe)
                noted.append(name)
                if progress:
                    progress("quantise", len(noted), len(plan.shapes))

        kept = [group for group, part in parts.items() if part.is_file()]
        left = len(kept) < len(parts)
        _expect_room(run, plan.bytes_out + _small_bytes(plan, reader, side_files), plan.kept_bytes if left else 0, plan.moments_bytes if executor and left else 0)
        if run.resumed:
            _log.warning("going on from %s: %d of %d layers are done", run.folder, sum(map(len, kept)), len(plan.shapes))
        for group in kept:
            note(group)

        def task(group: tuple[str, ...], moments: Path | None) -> GroupTask:
            return GroupTask(plan.model.absolute(), group, plan.recipe, parts[group], moments, worker_threads if executor else threads)

        if plan.calibrated:
            _calibrate(plan, run, parts, calibration or "", device, threads, note, progress, partial(_hand_over, run=run, task_of=task, executor=executor, note=note) if executor else None)
        else:
            stored = StoredHessians(plan.hessians) if plan.hessians else None
            run_tasks([task(group, stored.file(group[0]).absolute() if stored else None) for group in parts if group not in kept], executor, lambda task: note(task.modules))
        for group in parts:
            if group[0] not in noted:  # done meanwhile by an earlier run's worker, which lived on
                note(group)

        reports: dict[str, LayerReport] = {}

        def tensors() -> Iterator[tuple[str, StoredTensor | QuantizedMatrix]]:
            quantised = {f"{name}.weight" for name in plan.shapes}
            for name in reader.names:
                if name not in quantised:
                    yield name, reader.tensor(name)
            for part in parts.values():
                for name, matrix in read_matrices(part, plan.recipe):
                    reports[name] = layer_report(matrix)
                    yield f"{name}.weight", matrix

        save(plan.out, tensors(), plan.dialect, config=reader.config, side_files=side_files, max_shard_bytes=plan.max_shard_bytes, build_in=run.assemble(parts.values()))
    return reports


def _partial_run(plan: Plan | CalibrationPlan, reader: CheckpointReader, calibration: str | None, device: str, threads: int | None) -> PartialRun:
    """The run's hidden folder, and what tells this run from others."""
    cpu_capability = _hf().cpu_capability() if plan.tokens else None
    return PartialRun(plan.out, lambda: identity_of(plan, reader, calibration, device, threads, cpu_capability))


def _expect_room(run: PartialRun, in_the_end: int, beside: int, moments: int = 0) -> None:
    """Refuse now, with OSError(ENOSPC), what will not fit: the result, what is kept beside it while it is made, less what of the two is there, and what an executor's tasks read."""
    parts, result = run.bytes_there()
    needed, free = max(in_the_end - result, 0) + max(beside - parts, 0) + moments, shutil.disk_usage(run.out.parent).free
    if free < needed:
        what = f"{needed} bytes more than what is kept" if run.resumed else f"{needed} bytes while it is made, {in_the_end} of them in the end"
        raise OSError(errno.ENOSPC, f"{run.out} needs {what}, but its filesystem has only {free} free")


def _small_bytes(plan: Plan, reader: CheckpointReader, side_files: Iterable[Path]) -> int:
    """At most what is written beside the data of tensors: side files; of each tensor its places in headers, index and configuration; of each layer those too, its report twice, a stored rotation, and what is left of a
    filesystem's block."""
    return sum(path.stat().st_size + 4096 for path in side_files) + 65536 + 1024 * len(reader.names) + (8192 + 2 * (plan.recipe.rotation or 0) ** 2) * len(plan.shapes)


def _hand_over(
    groups: Iterable[tuple[tuple[str, ...], Moments]], *, run: PartialRun, task_of: Callable[[tuple[str, ...], Path | None], GroupTask], executor: Executor, note: Callable[[tuple[str, ...]], None]
) -> None:
    """Have a block's groups quantised by an executor. What is known of each is a file for as long as its task lasts."""

    def tasks() -> Iterator[GroupTask]:
        for number, (group, moments) in enumerate(groups):
            path = run.scratch(str(number))
            write_moments(path, moments)
            yield task_of(group, path)

    def done(task: GroupTask) -> None:
        note(task.modules)
        cast(Path, task.moments).unlink()

    run_tasks(tasks(), executor, done)


def _block_number(file: SafetensorsFile, what: str) -> int:
    """What a file that is kept between blocks says it is of."""
    if not re.fullmatch("[0-9]{1,9}", file.metadata.get(what, "")):
        raise ValueError(f"{file.path} is not what a run keeps between blocks; remove the folder to begin anew")
    return int(file.metadata[what])


class _Ledger:
    """What a run with a text keeps beside what it is for: the inputs of the next block."""

    def __init__(self, run: PartialRun) -> None:
        self._run = run

    def state(self) -> tuple[int, dict[str, NDArray[Any]]] | None:
        if not self._run.has("hidden"):
            return None
        file = SafetensorsFile(self._run.part("hidden"))
        return _block_number(file, "blocks"), {name: file.tensor(name).bits for name in file.names}

    def keep_state(self, blocks: int, hidden: dict[str, NDArray[Any]]) -> None:
        write_part(self._run.part("hidden"), hidden, {"blocks": str(blocks)})


class _QuantizedLedger(_Ledger):
    """The same where layers are quantised, whose answers the next blocks are given, with the output Hessians of blocks that share a backward pass."""

    def __init__(self, run: PartialRun, parts: Mapping[tuple[str, ...], Path], recipe: Recipe) -> None:
        super().__init__(run)
        self._recipe = recipe
        self._part_of = {name: part for group, part in parts.items() for name in group}

    def matrix(self, module: str) -> QuantizedMatrix | None:
        part = self._part_of.get(module)
        return dict(read_matrices(part, self._recipe))[module] if part and part.is_file() else None

    def output_hessians(self, first_block: int) -> dict[str, Hessian] | None:
        if not self._run.has("outputs"):
            return None
        file = SafetensorsFile(self._run.part("outputs"))
        if _block_number(file, "first block") != first_block:
            return None
        return {name.removesuffix(".tokens"): hessian_of(file, name.removesuffix("tokens")) for name in file.names if name.endswith(".tokens")}

    def keep_output_hessians(self, first_block: int, hessians: dict[str, Hessian]) -> None:
        tensors = {f"{module}.{name}": tensor for module, hessian in hessians.items() for name, tensor in hessian_tensors(hessian).items()}
        write_part(self._run.part("outputs"), tensors, {"first block": str(first_block)})


def _calibrate(
    plan: Plan,
    run: PartialRun,
    parts: Mapping[tuple[str, ...], Path],
    text: str,
    device: str,
    threads: int | None,
    note: Callable[[tuple[str, ...]], None],
    progress: Progress | None,
    elsewhere: Callable[[Iterable[tuple[tuple[str, ...], Moments]]], None] | None,
) -> None:
    """Pass the text through the model, block by block, and keep each group of layers as it is quantised, here or elsewhere."""
    if all(part.is_file() for part in parts.values()):
        return
    hf, inputs = _windows(plan, text, threads)
    ledger = _QuantizedLedger(run, parts, plan.recipe)
    model, source = _open_model(hf, plan, device, ledger.matrix)
    group_of = {name: group for group in parts for name in group}
    ready: dict[str, QuantizedMatrix] = {}

    def gradients(stage: str, done: int, total: int) -> None:
        if progress and stage == "gradients":
            progress(stage, done, total)

    for name, matrix in hf.calibrate(model, inputs, plan.recipe, list(plan.shapes), batch_windows=BATCH_WINDOWS, threads=threads, progress=gradients, ledger=ledger, source=source, elsewhere=elsewhere):
        ready[name] = matrix
        group = group_of[name]
        if ready.keys() == set(group):
            write_matrices(parts[group], ready)
            ready = {}
            note(group)


def store_hessians(plan: CalibrationPlan, calibration: str, *, device: str = "cpu", threads: int | None = None, progress: Progress | None = None) -> int:
    """Pass a text through a model as it is, and write its layers' Hessians as each block gives them; how many tokens the text has. Each is kept in the hidden folder ``.OUT.partial``; where the run is cut short
    the same call goes on from there, to the same bytes. The output appears whole or not at all.

    ``device``, ``threads``: as in :func:`quantize_checkpoint`. ``progress``: called as progress("calibrate", layers done, layers). Raises what that raises, and what ``hf.observe_hessians`` does.
    """
    reader = CheckpointReader(plan.model)
    with _partial_run(plan, reader, calibration, device, threads) as run:
        hf, inputs = _windows(plan, calibration, threads)
        if plan.finished:
            stored = StoredHessians(plan.out)
            _check_widths(plan, {group: stored.file(group[0]) for group in stored.groups})
            return int(inputs.numel())
        files = {group: run.result() / f"{number:05d}.safetensors" for number, group in enumerate(fused_groups(plan.shapes))}
        kept = [group for group, file in files.items() if file.is_file()]
        small = 8192 * (len(files) + 1)  # what headers and index take, and is left of a filesystem's blocks
        _expect_room(run, plan.bytes_out + small, plan.kept_bytes if len(kept) < len(files) else 0)
        if run.resumed:
            _log.warning("going on from %s: the Hessians of %d of %d layers are done", run.folder, sum(map(len, kept)), len(plan.shapes))
        if len(kept) < len(files):
            model, source = _open_model(hf, plan, device, lambda module: None)
            report = partial(progress, "calibrate") if progress else None
            for group, hessian in hf.observe_hessians(model, inputs, list(plan.shapes), batch_windows=BATCH_WINDOWS, threads=threads, progress=report, ledger=_Ledger(run), source=source):
                write_part(files[group], hessian_tensors(hessian))
        _check_widths(plan, files)
        building = run.assemble(files.values(), begun=True)
        write_index(building, {name: file.name for group, file in files.items() for name in group})
        publish(building, plan.out)
    return int(inputs.numel())


def _check_widths(plan: CalibrationPlan, files: Mapping[tuple[str, ...], Path]) -> None:
    """ValueError where a file holds no Hessian, or one of another width, by name."""
    for group, file in files.items():
        if (cols := stored_cols(file)) != (width := plan.shapes[group[0]][1]):
            raise ValueError(f"{file} is of {cols} columns; {group[0]} has {width}")


def _windows(plan: Plan | CalibrationPlan, text: str, threads: int | None) -> tuple[Any, Any]:
    """(the folder that imports torch, the text's windows of tokens), with so many threads of torch's from now on."""
    hf = _hf()
    if threads:
        hf.use_threads(threads)
    inputs = hf.token_windows(hf.load_tokenizer(plan.model), text, plan.tokens // plan.sequence, plan.sequence)
    if inputs.numel() < plan.tokens:
        _log.warning("the calibration text has only %d of the %d tokens asked for", inputs.numel(), plan.tokens)
    return hf, inputs


def _hf() -> Any:
    """The folder that imports torch."""
    try:
        from . import hf
    except ImportError as error:
        raise ImportError(f"calibration runs the model with torch and transformers, which are not installed ({error.name}): pip install 'mrgptq[hf]'") from error
    return hf


def _open_model(hf: Any, plan: Plan | CalibrationPlan, device: str, answer: Callable[[str], QuantizedMatrix | None]) -> tuple[Any, Any]:
    """(model, where its blocks come from): held whole, in which case that is None, or one block at a time."""
    model = hf.load_streamed(plan.model, device=device) if plan.streamed else None
    if model is not None:
        return model, hf.StreamedBlocks(plan.model, model, answer)
    if plan.streamed:
        _log.warning("%s names its tensors otherwise than transformers does, so it is held in memory whole, %s in float32", plan.model, format_bytes(plan.model_bytes))
    return hf.load_model(plan.model, device=device), None
