"""What a run over a whole checkpoint takes of memory, against what its plan states: each recipe in a process of its own, anonymous memory sampled.

    python bench/bench_memory.py --gigabytes 2 --tokens 512                 a Llama of random weights, made for it
    python bench/bench_memory.py --model MODEL --calibration TEXT --tokens 65536

Mapped files are left out, whose pages the system takes back when it wants them; so is what libraries hold before the run begins.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from synthetic import write_model

PROGRAM = """
import json, sys, time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, sys.argv[8])
from anonymous import Peak
import mrgptq as mg
from mrgptq.jobs import quantize_checkpoint
from mrgptq.plan import make_plan

model, out, calibration, small, what, tokens, threads = sys.argv[1:8]

def run(model, out, tokens):
    name, _, kind = what.partition(" ")
    recipe = mg.Recipe.named(name)
    hessians = None
    if kind == "under Hessians":
        hessians, recipe = Path(out + ".hessians"), replace(recipe, cross=0.0, output_hessian=None)
        shapes = make_plan(model, out, mg.Recipe.named("rtn")).shapes
        if not hessians.exists():
            shared = {cols: mg.Hessian(cols) for _, cols in shapes.values()}
            for cols, hessian in shared.items():
                hessian.update(__import__("numpy").random.default_rng(cols).standard_normal((2 * cols, cols), dtype="float32"))
            mg.save_hessians(hessians, {module: shared[cols] for module, (_, cols) in shapes.items()})
            shared.clear()
    plan = make_plan(model, out, recipe, tokens=tokens, sequence=256, hessians=hessians)
    return plan, lambda: quantize_checkpoint(plan, Path(calibration).read_text(encoding="utf-8"), threads=int(threads))

run(small, out + "-small", 512)[1]()  # brings in what is imported late
plan, call = run(model, out, int(tokens))
peak, begin = Peak(), time.perf_counter()
call()
print(json.dumps({"stated": plan.memory_bytes, "peak": peak.above, "seconds": time.perf_counter() - begin, "streamed": plan.streamed, "model": plan.bytes_in}))
"""
SMALL = Path(__file__).parents[1] / "examples" / "models" / "leaf"
KINDS = ("rtn", "mr-gptq under Hessians", "mr-gptq", "best")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, default=SMALL, help="(default: examples/models/leaf)")
    which.add_argument("--gigabytes", type=float, help="make a model of this size, in a temporary folder")
    parser.add_argument("--calibration", type=Path, default=SMALL.parents[1] / "text" / "calibration.txt")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", nargs="+", choices=KINDS, default=KINDS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if args.gigabytes:
            model = Path(folder, "model")
            print(write_model(model, args.gigabytes, SMALL) + "\n")
        print("| run | stated | measured | of it | seconds | model in memory |\n|---|---|---|---|---|---|")
        for number, what in enumerate(args.runs):
            command = [sys.executable, "-c", PROGRAM, str(model), f"{folder}/out{number}", str(args.calibration), str(SMALL), what, str(args.tokens), str(args.threads), str(Path(__file__).parent)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            row = json.loads(done.stdout.splitlines()[-1])
            if not row["peak"] <= row["stated"]:
                print(f"{what} took more than its plan stated", file=sys.stderr)
            held = "one block" if row["streamed"] else "all of it" if what in ("mr-gptq", "best") else "one layer"
            print(f"| {what} | {row['stated'] / 1e6:.0f} MB | {row['peak'] / 1e6:.0f} MB | {row['peak'] / row['stated']:.2f} | {row['seconds']:.0f} | {held} |", flush=True)


if __name__ == "__main__":
    main()
