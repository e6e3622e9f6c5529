"""Accuracy of best against mr-gptq, paired over several calibration sets: perplexity on a near and a far text, divergence from the original, layer error.

    python bench/bench_best.py --model MODEL --calibration calibration.txt --text test.txt --far modern.txt --sets 4 --json best.json
    python bench/bench_best.py --table a.json b.json          the tables of earlier runs taken together

Set s is windows 128 s ... 128 s + 127 (512 tokens each) of the calibration text; --first-set 0.5 begins half a set later, for sets that share half their text with two others.
The near text gives 256 windows from its first 1 200 000 characters, the far one 128. A gap is a perplexity less the original's; "tempered" is the far perplexity with the logits divided by
the temperature that suits the original there best, a difference is to mr-gptq, paired by set; "less" compares its mean over the sets with that of mr-gptq as the paper ships it (rotated,
four-thirds for MXFP4, absmax activations), with a standard error from leaving out one set at a time. Bytes that are not UTF-8 are read as U+FFFD.
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

import mrgptq as mg
from mrgptq.display import align
from mrgptq.study.accuracy import measure


def recipes(which):
    """(label, Recipe) by format and use; the first of each use is what the others are compared with."""
    rows = []
    for format, paper in (("nvfp4", "even"), ("mxfp4", "four-thirds")):
        shipped = replace(mg.Recipe.named("mr-gptq", format), mx_rule=paper)
        best = mg.Recipe.named("best", format)
        rows += [("mr-gptq", shipped), ("best", best), *((f"best, cross {cross:g}", replace(best, cross=cross)) for cross in (0.0, 0.25, 0.5, 0.75) if cross != best.cross)]
        rows.append(("best, outputs alike", replace(best, output_hessian=None)))
        rows.append(("mr-gptq", replace(shipped, activations=format)))
        if format == "mxfp4":
            rows.append(("best, rotated 32", replace(mg.Recipe.named("best", format, activations=format), rotation=32)))
        rows.append(("best-online", mg.Recipe.named("best-online", format, dialect="mrgptq", activations=format)))
        rows.append(("best", mg.Recipe.named("best", format, activations=format)))
    return [(label, recipe) for label, recipe in rows if not which or which in f"{label} {recipe.format} W4A{4 if recipe.activations else 16}"]


def reduction(gaps, base):
    """(1 - mean gap / mean base gap, its jackknife standard error) over sets, both lists in the same order."""
    full = 1 - sum(gaps) / sum(base)
    n = len(gaps)
    if n < 2:
        return full, None
    left = [1 - (sum(gaps) - gaps[i]) / (sum(base) - base[i]) for i in range(n)]
    mean = sum(left) / n
    return full, ((n - 1) / n * sum((x - mean) ** 2 for x in left)) ** 0.5


def mean_and_error(values):
    """A mean with its standard error, as text."""
    values = list(values)
    return f"{statistics.fmean(values):.3f}" + (f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else "")


def table(rows):
    """Rows (set, AccuracyRow as dict) as aligned text, a line for each recipe and use."""
    original = next(row for _, row in rows if row["format"] is None)
    lines = [("use", "recipe", "sets", "layer error", "perplexity", "gap", "less", "far perplexity", "difference", "tempered", "difference", "divergence", "less", "far divergence", "less", "seconds")]
    lines.append(("–", "original", "–", "–", f"{original['perplexity']:.3f}", "–", "–", f"{original['far_perplexity']:.2f}", "–", f"{original['far_tempered']:.2f}", *["–"] * 6))
    cells = {}
    for calibration_set, row in rows:
        if row["format"]:
            cells.setdefault((row["format"], bool(row["activations"]), row["recipe"]), {})[calibration_set] = row
    for (format, quantised_inputs, recipe), by_set in cells.items():
        base = cells.get((format, quantised_inputs, "mr-gptq"), {})
        shared = [s for s in by_set if s in base]
        sets = shared or list(by_set)  # a gap is compared over the sets that both have
        mine = [by_set[s] for s in sets]
        cut = []
        for field, zero in (("perplexity", original["perplexity"]), ("divergence", 0.0), ("far_divergence", 0.0)):
            if recipe == "mr-gptq" or not shared:
                cut.append("–")
                continue
            fraction, error = reduction([row[field] - zero for row in mine], [base[s][field] - zero for s in sets])
            cut.append(f"{100 * fraction:.0f} %" + (f" ± {100 * error:.0f}" if error is not None else ""))
        far = []
        for field in ("far_perplexity", "far_tempered"):
            far += [mean_and_error(row[field] for row in mine), "–" if recipe == "mr-gptq" or not shared else mean_and_error(row[field] - base[s][field] for s, row in zip(sets, mine, strict=True))]
        lines.append(
            (
                f"{format.upper()} W4A{4 if quantised_inputs else 16}",
                recipe,
                str(len(sets)),
                f"{statistics.fmean(row['relative_error'] for row in mine):.3e}",
                mean_and_error(row["perplexity"] for row in mine),
                f"{statistics.fmean(row['perplexity'] for row in mine) - original['perplexity']:.3f}",
                cut[0],
                *far,
                f"{statistics.fmean(row['divergence'] for row in mine):.5f}",
                cut[1],
                f"{statistics.fmean(row['far_divergence'] for row in mine):.5f}",
                cut[2],
                f"{statistics.median(row['seconds'] for row in mine):.0f}",
            )
        )
    return align(lines, numeric=(2, 3, 5, 11, 13, 15))


def main():
    """Measure set after set, or read rows measured before, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibration", "text", "far"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--sets", type=int, default=4, help="calibration sets (default: 4)")
    parser.add_argument("--first-set", type=float, default=0.0)
    parser.add_argument("--rows", default="", help='only rows whose name holds this, such as "nvfp4 W4A16" or "best-online"')
    parser.add_argument("--windows", type=int, default=128, help="calibration windows in a set (default: 128)")
    parser.add_argument("--test-windows", type=int, default=256, help="windows of the near text (default: 256)")
    parser.add_argument("--far-windows", type=int, default=128, help="windows of the far text (default: 128)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, nargs="+", metavar="JSON")
    args = parser.parse_args()
    if args.table:
        rows = [tuple(row) for path in args.table for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
        print(table(rows))
        return
    if not (args.model and args.calibration and args.text and args.far):
        parser.error("--model, --calibration, --text and --far are needed, or --table")
    calibration, text, far = (path.read_text(encoding="utf-8", errors="replace") for path in (args.calibration, args.text, args.far))
    rows = []
    for calibration_set in (args.first_set + i for i in range(args.sets)):
        measured = measure(
            args.model, calibration, text[:1_200_000], recipes(args.rows), windows=args.windows, test_windows=args.test_windows, skip=round(calibration_set * args.windows), far=far, far_windows=args.far_windows, divergence=True, device=args.device
        )  # fmt: skip
        for row in measured:
            rows.append((calibration_set, asdict(row)))
            print(f"set {calibration_set}: {row}", file=sys.stderr, flush=True)
            if args.json:  # after every row, so that a run that is stopped leaves what it measured
                args.json.write_text(json.dumps({"build": mg.build_info(), "rows": rows}, indent=2) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
