"""The main job on a real model: quantise leaf to NVFP4 and MXFP4 by the default recipe, write checkpoints, then measure what RTN, GPTQ, MR-GPTQ and ours keep of it.

    python examples/demo.py [--out demo] [--model examples/models/leaf]
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import mrgptq as mg
from mrgptq.cli import main as mrgptq
from mrgptq.study.accuracy import as_json, measure, table
from mrgptq.study.plots import accuracy_chart

HERE = Path(__file__).parent


def main():
    """Run the demo; everything it writes lies in one folder, which is made anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "models" / "leaf")
    parser.add_argument("--out", type=Path, default=HERE.parent / "demo")
    parser.add_argument("--windows", type=int, default=128, help="windows of 512 tokens for calibration and for the perplexity (default: 128)")
    args = parser.parse_args()
    calibration, text = HERE / "text" / "calibration.txt", HERE / "text" / "test.txt"

    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    for format in ("nvfp4", "mxfp4"):
        command = ["quantize", str(args.model), str(args.out / f"{args.model.name}-{format}"), "--format", format, "--calibration", str(calibration), "--tokens", str(512 * args.windows)]
        print("\n$ mrgptq", *command, flush=True)
        if status := mrgptq(command):
            sys.exit(status)

    recipes = []
    for format in ("nvfp4", "mxfp4"):
        recipes += [(name, mg.Recipe.named(name, format, activations=activations)) for name in ("rtn", "gptq", "mr-gptq", "best") for activations in (None, format)]
        recipes.append(("best-online", mg.Recipe.named("best-online", format, dialect="mrgptq", activations=format)))
    print(f"\nPerplexity of {args.model.name} ({args.windows} windows of 512 tokens of {text.name}, lower is better)", flush=True)
    rows = list(
        measure(
            args.model,
            calibration.read_text(encoding="utf-8"),
            text.read_text(encoding="utf-8"),
            recipes,
            windows=args.windows,
            test_windows=args.windows,
            progress=lambda label: print(f"  measuring {label}", file=sys.stderr, flush=True),
        )
    )
    print(table(rows))
    accuracy_chart(rows, args.out / "accuracy.png", title=f"{args.model.name}: what 4 bits cost")
    (args.out / "accuracy.json").write_text(json.dumps(as_json(rows), indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten: the checkpoints {args.model.name}-nvfp4 and {args.model.name}-mxfp4, the picture accuracy.png and its numbers accuracy.json, all in {args.out}")


if __name__ == "__main__":
    main()
