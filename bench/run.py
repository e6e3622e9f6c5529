"""Measures the rooms of the core: the machine's bounds, then each bench_<room>.py that offers ``measure``.

    python bench/run.py --compare --threads 1 2 --json results.json     against every peer that is installed
    python bench/run.py --rooms gptq --compare --large                  one room, with the shape that takes minutes
    python bench/run.py --compare --threads 1 2 --write                 and the tables of bench/README.md anew

Contenders take turns in one process; figures are medians with the lowest and the highest. Results go to stdout, progress to stderr.
"""

import argparse
import importlib
import inspect
import json
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# All are read when OpenBLAS is loaded. The first two make it take another kernel than this processor's best and would flatter us; waiting threads that spin take the core from the next
# contender.
UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
DEFAULTS = {"OMP_WAIT_POLICY": "passive"}


def settled_environment() -> list[str]:
    """The variables that were unset; starts this script anew where any was set or a default is missing."""
    mark = "MRGPTQ_BENCH_UNSET"
    if mark not in os.environ:
        unset = [name for name in UNSET if name in os.environ]
        environment = DEFAULTS | {name: value for name, value in os.environ.items() if name not in UNSET} | {mark: ",".join(unset)}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    return [name for name in os.environ[mark].split(",") if name]


def rooms() -> dict[str, Path]:
    """{room: file} of every bench_<room>.py that offers ``measure``; the others are programs of their own."""
    found = {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py")) if "\ndef measure(" in path.read_text(encoding="utf-8")}
    return {"machine": HERE / "bounds.py"} | found


def show(row: dict) -> str:
    """A record as a line."""
    head = f"{row['room']:<9} {row['work']:<29} {row['shape']:<14} {row['contender']:<26} {row['threads']} threads "
    if row["median"] is None:
        return f"{head} not measured: {row['note']}"
    ratios = "".join(f"   {ratio:.2f} × {other}" for other, ratio in row["ratios"].items())
    return f"{head} {row['median']:9.3f} {row['unit']:<8} ({row['low']:.3f} – {row['high']:.3f}, {row['calls']} calls){ratios}"


def positive(text: str) -> int:
    """A number of threads."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of threads from 1 on")
    return value


def main() -> None:
    """Measure, print, write."""
    known = rooms()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", nargs="+", choices=known, default=list(known), help=f"which of {', '.join(known)} (default: all)")
    parser.add_argument("--threads", nargs="+", type=positive, default=None, help="numbers of threads (default: every core)")
    parser.add_argument("--compare", action="store_true", help="measure the peers too")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, measures nothing")
    parser.add_argument("--large", action="store_true", help="shapes that take minutes and several GB too")
    parser.add_argument("--ggml", type=Path, help="folder of libggml-base.so, such as llama_cpp/lib of llama-cpp-python: a peer of codecs and products")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true", help="write the tables of bench/README.md")
    args = parser.parse_args()
    if args.ggml and not (args.ggml / "libggml-base.so").is_file():
        parser.error(f"--ggml: there is no libggml-base.so in {args.ggml}")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.parent}")
    if args.write and args.quick:
        parser.error("--quick measures nothing that a table should show")
    if args.write and set(args.rooms) != set(known):
        parser.error("--write puts this run's tables in the place of all, and --rooms leaves some out, which would be lost: use --json, and give tables.py that file behind those of the other rooms")
    unset = settled_environment()

    import machine
    import tables
    from threadpoolctl import threadpool_limits

    start, rows = time.perf_counter(), []
    for threads in args.threads or [len(os.sched_getaffinity(0))]:
        for room in args.rooms:
            module = importlib.import_module(known[room].stem)
            asked = {"large": args.large, "ggml": args.ggml}
            extra = {name: value for name, value in asked.items() if value and name in inspect.signature(module.measure).parameters}
            with threadpool_limits(threads, user_api="blas"):
                measured = module.measure(threads=threads, quick=args.quick, compare=args.compare, **extra)
            rows += measured
            for row in measured:
                print(show(row), flush=True)
            print(f"{time.perf_counter() - start:6.0f} s  {room}, {threads} threads", file=sys.stderr, flush=True)
    command = "python bench/run.py " + " ".join(sys.argv[1:])
    result = {"command": command, "machine": machine.describe(args.ggml), "unset": unset, "wait_policy": os.environ["OMP_WAIT_POLICY"], "quick": args.quick, "seconds": time.perf_counter() - start, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if args.write:
        tables.write(result, HERE / "README.md")


if __name__ == "__main__":
    main()
