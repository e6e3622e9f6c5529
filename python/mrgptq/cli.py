"""The command line: ``mrgptq quantize``, ``calibrate``, ``merge``, ``evaluate``, ``generate``, ``inspect``, ``study``. Progress and warnings go to stderr, results to stdout."""

import argparse
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .arguments import build_parser
from .arrays import default_threads
from .checkpoint import load, load_hessians, loaders, merge_hessians
from .checkpoint.card import RECORD_NAME, error_table, offset_table
from .checkpoint.partial_run import discard
from .checkpoint.reader import read_config, read_json_object
from .checkpoint.scheme import Scheme, common_scheme
from .display import align, format_bytes, printable, sentence
from .formats import decode_e4m3
from .jobs import quantize_checkpoint, store_hessians
from .plan import make_plan, needs_calibration, plan_calibration, with_rotation
from .recipe import Recipe
from .result import QuantizedMatrix
from .tasks import end_with_parent


class _Progress:
    """A bar on stderr for each stage; plain lines where tqdm is not installed."""

    def __init__(self) -> None:
        try:
            from tqdm import tqdm
        except ImportError:
            tqdm = None
        self._tqdm: Any = tqdm
        self._bar: Any = None
        self._stage: str | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._tqdm is None:
            print(f"{stage} {done}/{total}", file=sys.stderr)
            return
        if stage != self._stage:
            self.close()
            self._stage, self._bar = stage, self._tqdm(total=total, desc=stage, file=sys.stderr, dynamic_ncols=True)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise OSError(f"the text {path} cannot be read: {error.strerror}") from None


def _recipe(args: argparse.Namespace) -> Recipe:
    activations = None if args.activations == "none" else args.activations
    recipe = with_rotation(Recipe.named(args.recipe, args.format, _dialect(args), activations), args.rotation)
    if args.cross is not None:
        recipe = replace(recipe, cross=args.cross)
    if args.output_hessian is not None:
        recipe = replace(recipe, output_hessian=None if args.output_hessian == "none" else args.output_hessian)
    return replace(recipe, pad=True) if args.pad else recipe


def _dialect(args: argparse.Namespace) -> str:
    """The dialect asked for, else the one that every loader knows, unless the recipe is for our own runtime."""
    return args.dialect or ("mrgptq" if args.recipe == "best-online" and args.activations != "none" else "compressed-tensors")


def _quantize(args: argparse.Namespace) -> None:
    recipe = _recipe(args)
    if args.hessians and args.calibration:
        raise ValueError("--calibration and --hessians are both given; Hessians stand in place of a text: leave one out")
    if args.calibration and not needs_calibration(recipe):
        logging.getLogger("mrgptq").warning("the recipe needs no text; %s is not read", args.calibration)
    text = _read_text(args.calibration) if args.calibration else None
    planned = partial(
        make_plan,
        args.model,
        args.out,
        recipe,
        dialect=_dialect(args),
        tokens=args.tokens,
        sequence=args.sequence,
        calibrated=text is not None,
        targets=args.targets,
        ignore=args.ignore,
        max_shard_bytes=args.max_shard_bytes,
        hessians=args.hessians,
    )
    plan = planned()
    _check_memory(plan.memory_of(args.workers or 0), args.memory_limit, f" with {args.workers} workers" if args.workers else "")
    if args.dry_run:
        print(plan, recipe, plan.layer_table(), sep="\n\n")
        return
    if args.restart:
        discard(args.out)
        plan = planned()  # what lies at OUT is no run's any more
    print(plan, file=sys.stderr)
    progress = _Progress()
    try:
        with _executor(args) as executor:
            worker_threads = max(1, (args.threads or default_threads()) // args.workers) if args.workers else args.threads
            reports = quantize_checkpoint(plan, text, device=args.device, threads=args.threads, executor=executor, worker_threads=worker_threads, progress=progress)
    except BrokenExecutor as error:
        raise OSError(f"a worker died, perhaps for want of memory: {error}") from error
    finally:
        progress.close()
    errors = [report.relative_error for report in reports.values() if report.relative_error is not None]
    fallbacks = sum(report.fallback is not None for report in reports.values())
    print(f"{plan.out}: {len(reports)} layers, {Scheme.of_recipe(recipe).label}, {recipe_line(recipe)}")
    if errors:
        minded = [report.output_error for report in reports.values() if report.output_error is not None]
        by_outputs = f", {sum(minded) / len(minded):.3e} as the predictions mind it" if minded else ""
        print(f"mean relative layer error {sum(errors) / len(errors):.3e}{by_outputs}, largest {max(errors):.3e}; {fallbacks} fallbacks")
    print(loaders(plan.dialect, Scheme.of_recipe(recipe), reports))


def _check_memory(needed: int, limit: int | None, by: str = "") -> None:
    """Refuse what is expected to take more than the limit."""
    if limit is not None and needed > limit:
        raise ValueError(f"the run is expected to take {format_bytes(needed)}{by} and what the libraries take; the limit is {format_bytes(limit)}")


@contextmanager
def _starting_without_interrupts() -> Iterator[None]:
    """Processes started inside have Ctrl-C blocked, which is for this one: it lets what is under way end. One that comes meanwhile is raised afterwards."""
    came: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.SIG_IGN:  # another thread may get it, and the main one would be told
        signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


@contextmanager
def _executor(args: argparse.Namespace) -> Iterator[Executor | None]:
    """What --workers or --scheduler ask for."""
    if args.workers:
        pool = ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_parent)
        try:
            with _starting_without_interrupts():
                for _ in range(args.workers):
                    pool.submit(os.getpid)
            yield pool
        finally:
            try:
                pool.shutdown(cancel_futures=True)
            except KeyboardInterrupt:  # once more: not even for that; the workers end with this process
                print("mrgptq: interrupted; the same command goes on from what is done", file=sys.stderr)
                os._exit(130)
    elif args.scheduler:
        try:
            from distributed import Client
        except ImportError as error:
            raise ImportError("--scheduler needs dask's distributed, which is not installed: pip install 'mrgptq[dask]'") from error
        with Client(args.scheduler) as client:
            yield client.get_executor()
    else:
        yield None


def _calibrate(args: argparse.Namespace) -> None:
    planned = partial(plan_calibration, args.model, args.out, tokens=args.tokens, sequence=args.sequence, targets=args.targets, ignore=args.ignore)
    plan = planned()
    _check_memory(plan.memory_bytes, args.memory_limit)
    text = _read_text(args.calibration)
    if args.restart:
        discard(args.out)
        plan = planned()
    print(plan, file=sys.stderr)
    progress = _Progress()
    try:
        tokens = store_hessians(plan, text, device=args.device, threads=args.threads, progress=progress)
    finally:
        progress.close()
    print(f"{args.out}: Hessians of {len(plan.shapes)} layers, {tokens} tokens")


def _merge(args: argparse.Namespace) -> None:
    merge_hessians(args.out, args.folders)
    merged = load_hessians(args.out)
    print(f"{args.out}: Hessians of {len(merged)} layers, {next(iter(merged.values())).tokens} tokens of {len(args.folders)} folders")


def recipe_line(recipe: Recipe) -> str:
    """A recipe's solver and scales in a few words."""
    search, rule = recipe.resolved_scales
    return f"{recipe.solver} with {search} scales" + (f" by the MX rule {rule}" if recipe.format == "mxfp4" else "")


def _hf(args: argparse.Namespace) -> Any:
    """The folder that imports torch, with as many threads as were asked for."""
    try:
        from . import hf
    except ImportError as error:
        raise ImportError(f"{args.command} runs the model with torch and transformers, which are not installed ({error.name}): pip install 'mrgptq[hf]'") from error
    if args.threads:
        hf.use_threads(args.threads)
    return hf


def _load(hf: Any, path: Path, args: argparse.Namespace) -> Any:
    """A model, quantised or not."""
    quantised = read_config(path / "config.json").get("quantization_config") if (path / "config.json").is_file() else None
    return hf.load_quantized(path, device=args.device, kernels=args.kernels) if quantised else hf.load_model(path, device=args.device)


def _generate(args: argparse.Namespace) -> None:
    hf = _hf(args)
    tokenizer = hf.load_tokenizer(args.model)
    model = _load(hf, args.model, args)

    def write(text: str) -> None:
        print(text, end="", flush=True)

    try:
        done = hf.generate(model, tokenizer, args.prompt, tokens=args.tokens, temperature=args.temperature, seed=args.seed, write=write)
    except KeyboardInterrupt:
        print()  # the text that came so far stays
        raise
    print()
    print(f"{done.prompt_tokens} tokens read in {done.prompt_seconds:.2f} s, {done.new_tokens} written, {done.tokens_per_second:.1f} a second", file=sys.stderr)


def _evaluate(args: argparse.Namespace) -> None:
    hf = _hf(args)
    inputs, targets = hf.token_windows(hf.load_tokenizer(args.model), _read_text(args.text), args.windows, args.sequence, targets=True)
    rows = [("model", "perplexity")]
    progress = _Progress()
    for path in filter(None, (args.reference, args.model)):
        model = _load(hf, path, args)
        done = 0

        def advance(count: int, path: Path = path) -> None:
            nonlocal done
            done += count
            progress(f"evaluate {path.name}", done, len(inputs))

        rows.append((str(path), f"{hf.perplexity(model, inputs, targets, progress=advance):.4f}"))
    progress.close()
    print(align(rows, numeric=(1,)))
    print(f"{targets.numel()} tokens in {len(inputs)} windows of {inputs.shape[1]}")


def _inspect(args: argparse.Namespace) -> None:
    tensors = load(args.model)
    matrices = {name.removesuffix(".weight"): value for name, value in tensors.items() if isinstance(value, QuantizedMatrix)}
    if not matrices:
        raise ValueError(f"{args.model} holds no quantised layer; inspect reads what `mrgptq quantize` writes")
    scheme = common_scheme(matrices)
    quantised_bytes = sum(matrix.nbytes for matrix in matrices.values())
    kept_bytes = sum(value.nbytes for value in tensors.values() if not isinstance(value, QuantizedMatrix))
    weights = sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices.values())
    print(f"{args.model}: {scheme.label}, {len(matrices)} layers")
    print(f"quantised {weights:,} weights in {format_bytes(quantised_bytes)}, {8 * quantised_bytes / weights:.3f} bits each; {format_bytes(kept_bytes)} kept as they were")
    record = args.model / RECORD_NAME
    if record.is_file():
        print(f"\n{_record(record)}")
    else:
        print(f"\nno {RECORD_NAME}: written by another tool, its errors are not known")
    print(f"\n{scale_histogram(matrices.values(), scheme.format)}")


def _study(args: argparse.Namespace) -> None:
    if os.path.lexists(args.out):
        raise FileExistsError(f"{args.out} exists already and is not overwritten; give another path or remove it")
    if not (folder := args.out.absolute().parent).is_dir() or not os.access(folder, os.W_OK):
        raise FileNotFoundError(f"{args.out} cannot be written: {folder} is no folder, or not yours to write to")
    if bool(args.calibration) != bool(args.text) or args.text and not args.model:
        raise ValueError("--calibration and --text go together, with a MODEL: methods are calibrated on the one and measured on the other")
    if (args.methods or args.formats or args.memory_limit) and not args.text:
        raise ValueError("--methods, --formats and --memory-limit are about what methods cost a model: give --calibration and --text, too")
    rows, total = None, 0
    if args.text:
        calibration, text = _read_text(args.calibration), _read_text(args.text)
        _hf(args)
        from .study.methods import cells, expected_memory, grid

        total = len(cells(args.methods, args.formats)) + 1
        needed = expected_memory(args.model, windows=args.windows, test_windows=args.windows)
        _check_memory(needed, args.memory_limit)
        print(f"methods: {total - 1} measurements of {args.model}, expected memory {format_bytes(needed)}", file=sys.stderr)
        rows = grid(args.model, calibration, text, methods=args.methods, formats=args.formats, windows=args.windows, test_windows=args.windows, device=args.device, threads=args.threads)
    try:
        from .study.findings import collect
        from .study.report import write_report
    except ImportError as error:
        raise ImportError(f"study draws its figures with matplotlib, which is not installed ({error.name}): pip install 'mrgptq[plot]'") from error
    progress = _Progress()
    findings = collect(args.model, values=args.values, seed=args.seed, threads=args.threads, progress=lambda what, done, total: progress("study", done, total))
    for row in rows or ():
        findings.methods.append(row)
        progress("methods", len(findings.methods), total)
    command = ["study", *([str(args.model)] if args.model else []), "--out", str(args.out), "--values", str(args.values), "--seed", str(args.seed)]
    if args.text:
        command += ["--calibration", str(args.calibration), "--text", str(args.text), "--windows", str(args.windows)]
        command += [word for option in ("methods", "formats") if (names := getattr(args, option)) for word in (f"--{option}", ",".join(names))]
    progress.close()
    write_report(findings, args.out, command)
    print(f"{args.out}: the study{f' and the weights of {args.model}' if args.model else ''}")


def _record(path: Path) -> str:
    """The record of a run as text; ValueError where it is none."""
    stored = read_json_object(path)
    try:
        layers = stored.get("layers") or {}
        recipe = [str(Recipe.from_dict(stored["recipe"]))] if stored.get("recipe") else []
        return "\n\n".join([*recipe, error_table(layers), offset_table(layers)])
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:  # a list where a table should be, a word where a number should be
        raise ValueError(f"{path} is no record of a run: {error}") from None


def scale_histogram(matrices: Iterable[QuantizedMatrix], format: str) -> str:
    """How often each power of two occurs among the stored scales, as lines with bars; E4M3 scales are counted by their exponent, whatever their sign, and zeros left out."""
    exponents = []
    for matrix in matrices:
        stored = np.bincount(matrix.scales.reshape(-1), minlength=256)
        used = np.flatnonzero(stored)
        used = used if format == "mxfp4" else used[used & 0x7F != 0]
        powers = used - 127 if format == "mxfp4" else np.floor(np.log2(decode_e4m3(used & 0x7F))).astype(int)
        exponents.append(np.bincount(powers + 200, weights=stored[used], minlength=400))
    counts = np.sum(exponents, axis=0)
    present = np.flatnonzero(counts)
    if not present.size:
        return "every scale is zero"
    rows = [("scale", "groups", "share")]
    for i in range(present[0], present[-1] + 1):
        share = counts[i] / counts.sum()
        rows.append((f"2^{i - 200}", f"{int(counts[i])}", f"{100 * share:5.1f} %  {'#' * round(40 * share)}"))
    return align(rows, numeric=(0, 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(arguments)
    commands = {"quantize": _quantize, "calibrate": _calibrate, "merge": _merge, "evaluate": _evaluate, "generate": _generate, "inspect": _inspect, "study": _study}
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    try:
        commands[args.command](args)
        sys.stdout.flush()  # here, where a reader that has gone is told from an error
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's own flush fails again
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        for line in (sentence(error), *_notes(error)):
            print(f"mrgptq: {printable(line)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        left = _notes(error) or ["nothing was written"] * (args.command == "quantize")
        print("; ".join(["mrgptq: interrupted", *left]), file=sys.stderr)
        return 130
    return 0


def _notes(error: BaseException) -> list[str]:
    """What was added to an exception, or to the one that it stands for."""
    return [*getattr(error, "__notes__", ()), *getattr(error.__cause__, "__notes__", ())]


if __name__ == "__main__":
    sys.exit(main())
