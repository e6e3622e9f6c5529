"""The command line: ``mrgptq quantize``, ``evaluate``, ``generate``, ``inspect``. Progress and warnings go to stderr, results to stdout."""

import argparse
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__
from .checkpoint import DIALECTS, dialect_named, load
from .checkpoint.card import RECORD_NAME, error_table, offset_table
from .checkpoint.reader import read_config, read_json_object
from .checkpoint.scheme import Scheme, common_scheme
from .display import align, format_bytes, printable
from .formats import FORMATS, decode_e4m3
from .jobs import make_plan, quantize_checkpoint, with_rotation
from .modules import DEFAULT_IGNORE, DEFAULT_TARGETS
from .recipe import NAMES, Recipe
from .result import QuantizedMatrix

_DESCRIPTION = """\
Quantise language models to 4-bit floats (NVFP4, MXFP4) with MR-GPTQ, on a CPU.

  mrgptq quantize MODEL OUT --calibration text.txt      write a quantised checkpoint
  mrgptq evaluate OUT --text test.txt --reference MODEL perplexity, beside the original's
  mrgptq generate OUT "Once upon a time"                text, token by token, on packed weights
  mrgptq inspect OUT                                    errors, bits and scales of every layer

MODEL and OUT are folders in Hugging Face layout (config.json, safetensors, tokenizer).
`mrgptq COMMAND --help` explains each. Exit status: 0 done, 1 refused (with the reason), 2 wrong usage."""

_QUANTIZE = """\
Quantise the linear layers of MODEL and write a checkpoint to OUT, which must not exist yet.

recipes
  best         GPTQ that chooses the scales too, then rounds of refinement: the least error, on a
               layout that every loader of the dialect runs
  best-online  the same for runtimes that also rotate inputs and search their scales where that
               pays, at W4A4: our own (dialect mrgptq, taken by default then)
  mr-gptq      GPTQ after block Hadamard rotations, searched scales: the paper's method. The inputs
               must be rotated too when the model runs, which not every loader does: transformers
               ignores the rotation and answers nonsense. --rotation 0 gives a checkpoint for all.
  gptq         GPTQ with static activation order, absmax scales
  rtn          round to nearest; no calibration text needed (except for W4A4 NVFP4)

examples
  mrgptq quantize llama llama-nvfp4 --calibration wiki.txt
  mrgptq quantize llama llama-mxfp4 --format mxfp4 --activations mxfp4 --calibration wiki.txt
  mrgptq quantize llama llama-rtn --recipe rtn --dry-run"""


def build_parser() -> argparse.ArgumentParser:
    """The argument parser."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("mrgptq", description=_DESCRIPTION, formatter_class=formatter)
    parser.add_argument("--version", action="version", version=f"mrgptq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    quantize = commands.add_parser("quantize", help="write a quantised checkpoint", description=_QUANTIZE, formatter_class=formatter)
    quantize.add_argument("model", metavar="MODEL", type=Path, help="folder of the model")
    quantize.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist")
    quantize.add_argument("--format", choices=tuple(FORMATS), default="nvfp4", help="4-bit format (default: nvfp4)")
    quantize.add_argument("--recipe", choices=NAMES, default="best", help="method (default: best)")
    quantize.add_argument("--activations", choices=("none", *FORMATS), default="none", help="round each layer's inputs too: W4A4, in the same format (default: none, W4A16)")
    quantize.add_argument("--calibration", metavar="TEXT", type=Path, help="text file that the model is calibrated on, UTF-8, like what it will read")
    quantize.add_argument("--tokens", type=_positive, default=65536, help="calibration tokens (default: 65536)")
    quantize.add_argument("--sequence", type=_positive, default=512, help="tokens in a window (default: 512)")
    quantize.add_argument("--dialect", choices=tuple(DIALECTS), help="layout on disk (default: compressed-tensors; mrgptq for W4A4 best-online)")
    quantize.add_argument("--targets", metavar="REGEX", default=DEFAULT_TARGETS, help="modules to quantise (default: linear layers inside numbered blocks, without routers)")
    quantize.add_argument("--ignore", metavar="REGEX", default=DEFAULT_IGNORE, help=f"modules to leave as they are (default: {DEFAULT_IGNORE})")
    quantize.add_argument("--rotation", metavar="N", type=int, help="block size of the Hadamard rotation, 0 for none (default: the recipe's)")
    quantize.add_argument("--cross", metavar="X", type=float, help="how far targets make up for the layers before, 0 … 1, by a second pass through the original model; 0 saves that pass (default: the recipe's)")
    quantize.add_argument("--output-hessian", choices=("none", "fisher"), help="weigh each layer's outputs by what they matter to the predictions, found by backward passes, one for each 4 GiB of matrices (--dry-run counts them); none saves them (default: the recipe's)")
    quantize.add_argument("--max-shard-bytes", metavar="N", type=_positive, default=5_000_000_000, help="size a file of the checkpoint may reach (default: 5e9)")
    quantize.add_argument("--dry-run", action="store_true", help="print the plan, sizes and expected memory, then stop")
    _add_common(quantize)
    quantize.set_defaults(run=_quantize)

    evaluate = commands.add_parser(
        "evaluate",
        help="perplexity on a text",
        formatter_class=formatter,
        description="Perplexity of a quantised checkpoint on a text, computed in float32 by the loaders' rules: rotations applied, W4A4 inputs rounded.\n\n  mrgptq evaluate OUT --text test.txt --reference MODEL",
    )
    evaluate.add_argument("model", metavar="OUT", type=Path, help="quantised checkpoint, or a plain model")
    evaluate.add_argument("--text", metavar="TEXT", type=Path, required=True, help="text file, UTF-8, other than the calibration's")
    evaluate.add_argument("--reference", metavar="MODEL", type=Path, help="unquantised model to set beside it")
    evaluate.add_argument("--windows", type=_positive, default=256, help="windows to score, at most (default: 256)")
    evaluate.add_argument("--sequence", type=_positive, default=512, help="tokens in a window (default: 512)")
    _add_running(evaluate)
    evaluate.set_defaults(run=_evaluate)

    generate = commands.add_parser(
        "generate",
        help="continue a text",
        formatter_class=formatter,
        description="Continue a text with a quantised checkpoint, its weights packed, or with a plain model. The text goes to stdout as it comes, tokens a second to stderr.\n\n"
        '  mrgptq generate OUT "Once upon a time" --tokens 200 --temperature 0.8',
    )
    generate.add_argument("model", metavar="OUT", type=Path, help="quantised checkpoint, or a plain model")
    generate.add_argument("prompt", metavar="PROMPT", help="the text to continue")
    generate.add_argument("--tokens", type=_positive, default=128, help="new tokens, at most (default: 128)")
    generate.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0 takes the likeliest token each time, above 0 they are drawn (default: 0)")
    generate.add_argument("--seed", type=int, default=0, help="of the drawing (default: 0)")
    _add_running(generate)
    generate.set_defaults(run=_generate)

    inspect = commands.add_parser("inspect", help="what a quantised checkpoint holds", description="Errors, bits, fallbacks and the histogram of scales of a quantised checkpoint.", formatter_class=formatter)
    inspect.add_argument("model", metavar="OUT", type=Path, help="quantised checkpoint")
    inspect.set_defaults(run=_inspect)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="torch device of the forward passes (default: cpu); the quantisation itself runs on the CPU")
    parser.add_argument("--threads", type=_positive, help="threads (default: OMP_NUM_THREADS, or all cores); codes do not depend on it, forward passes may in their last bits")


def _add_running(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("--no-kernels", dest="kernels", action="store_false", default=None, help="dequantise the weights and round inputs in float32 instead of multiplying by packed weights (default on another device than cpu)")


def _positive(text: str) -> int:
    value = float(text)
    if not (1 <= value < 2**63 and value == int(value)):
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(value)


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
    return recipe


def _dialect(args: argparse.Namespace) -> str:
    """The dialect asked for, else the one that every loader knows, unless the recipe is for our own runtime."""
    return args.dialect or ("mrgptq" if args.recipe == "best-online" and args.activations != "none" else "compressed-tensors")


def _quantize(args: argparse.Namespace) -> None:
    recipe = _recipe(args)
    text = _read_text(args.calibration) if args.calibration else None
    plan = make_plan(
        args.model, args.out, recipe, dialect=_dialect(args), tokens=args.tokens, sequence=args.sequence, calibrated=text is not None, targets=args.targets, ignore=args.ignore, max_shard_bytes=args.max_shard_bytes
    )
    if args.dry_run:
        print(plan, recipe, plan.layer_table(), sep="\n\n")
        return
    print(plan, file=sys.stderr)
    progress = _Progress()
    try:
        reports = quantize_checkpoint(plan, text, device=args.device, threads=args.threads, progress=progress, max_shard_bytes=args.max_shard_bytes)
    finally:
        progress.close()
    errors = [report.relative_error for report in reports.values() if report.relative_error is not None]
    fallbacks = sum(report.fallback is not None for report in reports.values())
    print(f"{plan.out}: {len(reports)} layers, {Scheme.of_recipe(recipe).label}, {recipe_line(recipe)}")
    if errors:
        minded = [report.output_error for report in reports.values() if report.output_error is not None]
        by_outputs = f", {sum(minded) / len(minded):.3e} as the predictions mind it" if minded else ""
        print(f"mean relative layer error {sum(errors) / len(errors):.3e}{by_outputs}, largest {max(errors):.3e}; {fallbacks} fallbacks")
    print(dialect_named(plan.dialect).loaders(Scheme.of_recipe(recipe)))


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
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    try:
        args.run(args)
        sys.stdout.flush()  # here, where a reader that has gone is told from an error
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's own flush fails again
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        print(f"mrgptq: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mrgptq: interrupted" + ("; nothing was written" if args.command == "quantize" else ""), file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
