"""Layer error of recipes against mr-gptq under the same Hessians, on the calibration text and on a text that it did not see.

    python bench/bench_layers.py --model MODEL --calibration calibration.txt --held-out test.txt

Hessians are those of the unquantised model: 128 windows of 512 tokens of each text. The error is the unweighted mean of tr(E H E^T) / tr(W H W^T) over all linear layers; a
reduction compares a row with mr-gptq of the same format, rotation and MX rule. Seconds are those of factors and solves, in the order of the rows.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import mrgptq as mg
from mrgptq import hf
from mrgptq.checkpoint.reader import CheckpointReader
from mrgptq.display import align
from mrgptq.modules import select_modules
from mrgptq.study.layers import compare_layers


def recipes(which):
    """Per format, rotation and MX rule: mr-gptq, the steps from it to best, and what was tried around best."""
    rows = []
    for format, rotation, mx_rule in (("nvfp4", 16, "even"), ("nvfp4", None, "even"), ("mxfp4", 32, "four-thirds"), ("mxfp4", 32, "even"), ("mxfp4", None, "even")):
        key = f"{format} {rotation or 0} {mx_rule}"
        common = {"rotation": rotation, "mx_rule": mx_rule}
        mr = replace(mg.Recipe.named("mr-gptq", format), **common)
        best = replace(mg.Recipe.named("best", format), **common)
        rows += [(key, "rtn", replace(mg.Recipe.named("rtn", format), **common)), (key, "mr-gptq", mr)]
        rows += [(key, f"mr-gptq, {scales} scales", replace(mr, scales=scales)) for scales in ("absmax", "mse", "hessian", "hessian_block")]
        rows += [(key, f"best, {rounds} rounds", replace(best, rounds=rounds)) for rounds in (0, 1, 3)]
        rows += [(key, "best", best), (key, "best, 20 rounds", replace(best, rounds=20))]
        rows += [(key, f"best, {scales} scales", replace(best, scales=scales)) for scales in ("absmax", "hessian_block")]
        rows += [(key, f"best, damping {damping:g}", replace(best, damping=damping)) for damping in (0.001, 0.01, 0.1)]
        rows.append((key, "best, float32", replace(best, precision="float32")))
        if format == "nvfp4":
            rows.append((key, "best, alternating tensor scale", replace(best, tensor_scale="alternating")))
    return [(key, label, recipe) for key, label, recipe in rows if not which or which in f"{key} {label}"]


def main():
    """Measure, print one table a setting, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--rows", default="", help='only rows whose key holds this, such as "nvfp4 16" or "best"')
    parser.add_argument("--windows", type=int, default=128, help="windows of 512 tokens from each text (default: 128)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tokenizer, model, reader = hf.load_tokenizer(args.model), hf.load_model(args.model), CheckpointReader(args.model)
    modules = select_modules({name: reader.shape(name) for name in reader.names})
    hessians, held_out = (hf.collect_hessians(model, hf.token_windows(tokenizer, path.read_text(encoding="utf-8")[:700_000], args.windows, 512), modules) for path in (args.calibration, args.held_out))
    asked = recipes(args.rows)
    rows = []
    for (key, label, _), row in zip(asked, compare_layers(hf.layer_weights(model, modules), hessians, held_out, [(label, recipe) for _, label, recipe in asked]), strict=True):
        rows.append((key, row))
        print(f"{key}: {row}", file=sys.stderr)
    for key in dict.fromkeys(key for key, _ in rows):
        mine = [row for other, row in rows if other == key]
        base = next((row for row in mine if row.recipe == "mr-gptq"), None)
        lines = [("format rotation rule", "method", "error", "less", "held-out error", "less", "seconds")]
        for row in mine:
            less = ("–", "–") if base is None else tuple(f"{100 * (1 - a / b):.1f} %" for a, b in ((row.relative_error, base.relative_error), (row.held_out_error, base.held_out_error)))
            lines.append((key, row.recipe, f"{row.relative_error:.3e}", less[0], f"{row.held_out_error:.3e}", less[1], f"{row.seconds:.1f}"))
        print(align(lines, numeric=(2, 3, 4, 5, 6)), end="\n\n")
    if args.json:
        args.json.write_text(json.dumps({"build": mg.build_info(), "rows": [{"key": key, **asdict(row)} for key, row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
