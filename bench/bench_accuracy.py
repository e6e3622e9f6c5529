"""Accuracy of RTN, GPTQ and MR-GPTQ on a model of the user's: mean relative layer error and perplexity at W4A16 and W4A4.

    python bench/bench_accuracy.py --model MODEL --calibration calibration.txt --text test.txt --json accuracy.json

Protocol: the first 700 000 characters of the calibration text give 128 windows of 512 tokens, the first 1 200 000 of the test text 256 windows of 512, all positions
scored, no BOS, float32 on a CPU. The relative error is the unweighted mean over all linear layers, each under its own Hessian from the already quantised prefix.
"""

import argparse
import json
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

import mrgptq as mg
from mrgptq.study.accuracy import as_json, measure, table


def recipes(which):
    """The rows of the table: each format by its rules, with and without rotation."""
    rows = {}
    for format, rotations, mx_rule in (("nvfp4", (16, 128), "even"), ("mxfp4", (32, 128), "four-thirds"), ("mxfp4", (32,), "even")):
        for activations in (None, format):
            rtn, gptq, mr_gptq = (replace(mg.Recipe.named(name, format, activations=activations), mx_rule=mx_rule) for name in ("rtn", "gptq", "mr-gptq"))
            rows[f"rtn {mx_rule} {format} {activations}"] = ("rtn", rtn)
            rows[f"rtn rotated {mx_rule} {format} {activations}"] = ("rtn", replace(rtn, rotation=rotations[0]))
            rows[f"gptq {mx_rule} {format} {activations}"] = ("gptq", gptq)
            for k in rotations:
                rows[f"mr-gptq {k} {mx_rule} {format} {activations}"] = ("mr-gptq", replace(mr_gptq, rotation=k))
    return [pair for key, pair in rows.items() if not which or which in key]


def main():
    """Measure, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rows", default="", help='only rows whose key holds this, such as "nvfp4" or "mr-gptq 32 even"')
    parser.add_argument("--windows", type=int, default=128, help="calibration windows (default: 128)")
    parser.add_argument("--test-windows", type=int, default=256, help="windows that are scored (default: 256)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    calibration = args.calibration.read_text(encoding="utf-8")[:700_000]
    text = args.text.read_text(encoding="utf-8")[:1_200_000]
    rows, start = [], time.perf_counter()
    for row in measure(args.model, calibration, text, recipes(args.rows), windows=args.windows, test_windows=args.test_windows):
        rows.append(row)
        print(f"{time.perf_counter() - start:6.0f} s  {row}", file=sys.stderr)
    print(table(rows))
    if args.json:
        machine = {"machine": platform.machine(), **mg.build_info()}
        args.json.write_text(json.dumps({"machine": machine, "seconds": time.perf_counter() - start, "rows": as_json(rows)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
