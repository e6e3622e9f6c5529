"""Quantises a checkpoint as the command does and says where the time goes: forward passes, backward pass, Hessians, factors, solves, writing.

    python bench/bench_model.py --model MODEL --calibration calibration.txt --recipes mr-gptq best --threads 2 --json model.json

The phases are functions of the package, timed from outside: each has the seconds spent in it and in no other phase. "the model's own pass" is the unquantised model's over the same tokens
in the same process, which quantising cannot do without. Memory is the peak of resident memory less what was resident before, libraries included, beside what the plan stated (Linux).
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import mrgptq as mg
from mrgptq import group, hf, jobs
from mrgptq.plan import make_plan
from mrgptq.display import align, format_bytes

SMALL_MODEL = Path(__file__).parents[1] / "examples" / "models" / "leaf"
calibrate = importlib.import_module("mrgptq.hf.calibrate")
beside = importlib.import_module("mrgptq.hf.beside")
fisher = importlib.import_module("mrgptq.hf.fisher")
passage = importlib.import_module("mrgptq.hf.passage")

PHASES = (  # (phase, where the function is looked up, its name)
    ("load", hf, "load_model"),
    ("load", hf, "load_tokenizer"),
    ("load", hf, "token_windows"),
    ("forward passes", calibrate, "enter"),
    ("forward passes", passage, "run_block"),
    ("forward passes", beside, "run_block"),
    ("cross moments", calibrate, "observe_both"),
    ("backward pass", calibrate, "collect_output_hessians"),
    ("Hessians", mg.Hessian, "update"),
    ("factors", group, "make_factor"),
    ("solves and reports", group, "quantize_layer"),
    ("values back into the model", mg.QuantizedMatrix, "dequantize"),
    ("writing", jobs, "write_matrices"),
    ("writing", jobs, "write_part"),
    ("writing", jobs, "save"),
)
NAMES = tuple(dict.fromkeys(phase for phase, _, _ in PHASES))


class Stopwatch:
    """Seconds by phase; what a nested phase takes is not counted for the one around it."""

    def __init__(self):
        self.seconds = dict.fromkeys(NAMES, 0.0)
        self._running = []

    @contextmanager
    def phase(self, name):
        """Counts the block for a phase."""
        start = time.perf_counter()
        self._running.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] += spent - self._running.pop()
            if self._running:
                self._running[-1] += spent

    def around(self, name, function):
        """The function, counted for a phase."""

        def timed(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return timed


def resident(field):
    """Bytes of a field of /proc/self/status."""
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))


def run(args, recipe, calibration, out):
    """One run: seconds by phase, all of it, bytes at most and as planned."""
    watch, plan = Stopwatch(), make_plan(args.model, out, recipe, tokens=args.tokens)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = resident("VmRSS"), time.perf_counter()
    with ExitStack() as patches:
        for phase, owner, name in PHASES:
            patches.enter_context(mock.patch.object(owner, name, watch.around(phase, getattr(owner, name))))
        reports = jobs.quantize_checkpoint(plan, calibration, threads=args.threads)
    total = time.perf_counter() - start
    if len(reports) != len(plan.shapes) or any(report.fallback for report in reports.values()):
        raise SystemExit("not every layer was quantised as asked: the measurement is worth nothing")
    return {"seconds": watch.seconds | {"the rest": total - sum(watch.seconds.values())}, "total": total, "peak_bytes": resident("VmHWM") - before, "planned_bytes": plan.memory_bytes}


def own_pass(args, calibration):
    """Seconds of the unquantised model's forward pass over the calibration windows, in batches as calibration takes them."""
    import torch

    model, inputs = hf.load_model(args.model), hf.token_windows(hf.load_tokenizer(args.model), calibration, args.tokens // 512, 512)
    start = time.perf_counter()
    with torch.no_grad():
        for batch in inputs.split(8):
            model.base_model(input_ids=batch, use_cache=False)
    return time.perf_counter() - start


def main():
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=["mr-gptq", "best"])
    parser.add_argument("--format", default="nvfp4")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    calibration = args.calibration.read_text(encoding="utf-8")
    hf.use_threads(args.threads)
    own, results = own_pass(args, calibration), {}
    for name in args.recipes:
        print(f"{name} …", file=sys.stderr, flush=True)
        recipe = mg.Recipe.named(name, args.format)
        with tempfile.TemporaryDirectory() as folder:
            jobs.quantize_checkpoint(make_plan(SMALL_MODEL, Path(folder, "small"), recipe, tokens=512), calibration, threads=args.threads)  # brings in what is imported late
            results[name] = run(args, recipe, calibration, Path(folder, "out"))
    lines = [("phase", *results), *((phase, *(f"{result['seconds'][phase]:.1f} s" for result in results.values())) for phase in (*NAMES, "the rest"))]
    lines.append(("all", *(f"{result['total']:.1f} s" for result in results.values())))
    lines.append(("the model's own pass", *[f"{own:.1f} s"] * len(results)))
    lines.append(("memory at most", *(format_bytes(result["peak_bytes"]) for result in results.values())))
    lines.append(("memory as planned", *(format_bytes(result["planned_bytes"]) for result in results.values())))
    print(align(lines, numeric=range(1, 1 + len(results))))
    if args.json:
        args.json.write_text(json.dumps({"build": mg.build_info(), "threads": args.threads, "tokens": args.tokens, "own_pass": own, "recipes": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
