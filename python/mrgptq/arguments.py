"""The arguments of the command line: what each command takes, and its help."""

import argparse
from pathlib import Path

from . import __version__
from .checkpoint import DIALECTS
from .formats import FORMATS
from .modules import DEFAULT_IGNORE, DEFAULT_TARGETS
from .recipe import NAMES

_DESCRIPTION = """\
Quantise language models to 4-bit floats (NVFP4, MXFP4) with MR-GPTQ, on a CPU.

  mrgptq quantize MODEL OUT --calibration text.txt      write a quantised checkpoint
  mrgptq calibrate MODEL H --calibration text.txt       store the layers' Hessians, to quantise under them later
  mrgptq merge H H1 H2                                  Hessians of several texts as one
  mrgptq evaluate OUT --text test.txt --reference MODEL perplexity, beside the original's
  mrgptq generate OUT "Once upon a time"                text, token by token, on packed weights
  mrgptq inspect OUT                                    errors, bits and scales of every layer
  mrgptq study MODEL --out report.html                  what the formats lose, and why rotations help one of them

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
  mrgptq quantize llama llama-rtn --recipe rtn --dry-run
  mrgptq quantize llama llama-nvfp4 --calibration wiki.txt --workers 4
  mrgptq quantize llama llama-mr --recipe mr-gptq --hessians llama.hessians --workers 8

A run that is cut short, by whatever, keeps the layers it has done in the hidden folder .OUT.partial,
and the same command goes on from there, to the same bytes."""

_CALIBRATE = """\
Pass a text through MODEL as it is and store the second moment of every linear layer's inputs in the
folder OUT. Several machines can do so, each with a text of its own; `mrgptq merge` makes one of them.

  mrgptq calibrate llama llama.hessians --calibration wiki.txt --tokens 1e6
  mrgptq quantize llama llama-nvfp4 --recipe mr-gptq --hessians llama.hessians"""

_STUDY = """\
Write one page, complete in itself: what MXFP4, NVFP4 and 4-bit integers lose on model distributions
and, where MODEL is given, on its weights, with and without rotations; figures, tables, meanings.

  mrgptq study --out report.html
  mrgptq study llama --out llama.html
  mrgptq study llama --out llama.html --calibration wiki.txt --text news.txt     and what each method costs it"""


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
    _add_text(quantize)
    quantize.add_argument("--hessians", metavar="FOLDER", type=Path, help="stored Hessians (`mrgptq calibrate`) in place of a text; no layer then waits for another")
    quantize.add_argument("--dialect", choices=tuple(DIALECTS), help="layout on disk (default: compressed-tensors; mrgptq for W4A4 best-online)")
    _add_modules(quantize)
    quantize.add_argument("--rotation", metavar="N", type=int, help="block size of the Hadamard rotation, 0 for none (default: the recipe's); layers whose columns it does not divide take the largest power of two in it that does")
    quantize.add_argument("--pad", action="store_true", help="add columns of zeros to layers whose columns no group divides (dialect mrgptq); without it they are refused")
    quantize.add_argument("--cross", metavar="X", type=float, help="how far targets make up for the layers before, 0 … 1, by a second pass through the original model; 0 saves that pass (default: the recipe's)")
    quantize.add_argument("--output-hessian", choices=("none", "fisher"), help="weigh each layer's outputs by what they matter to the predictions, found by backward passes, one for each 4 GiB of matrices (--dry-run counts them); none saves them (default: the recipe's)")
    quantize.add_argument("--max-shard-bytes", metavar="N", type=_positive, default=5_000_000_000, help="size a file of the checkpoint may reach (default: 5e9)")
    quantize.add_argument("--dry-run", action="store_true", help="print the plan, sizes and expected memory, then stop")
    _add_memory_limit(quantize, "; with --workers of all processes together")
    _add_restart(quantize)
    where = quantize.add_mutually_exclusive_group()
    where.add_argument("--workers", metavar="N", type=_positive, help="quantise in so many processes beside this one, in which a text passes through the model; they share the threads")
    where.add_argument("--scheduler", metavar="ADDRESS", help="the same on the workers of a dask cluster that see the same files, such as tcp://host:8786, each with --threads threads")
    _add_common(quantize)

    calibrate = commands.add_parser("calibrate", help="store the Hessians of a model's layers", description=_CALIBRATE, formatter_class=formatter)
    calibrate.add_argument("model", metavar="MODEL", type=Path, help="folder of the model")
    calibrate.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist")
    calibrate.add_argument("--calibration", metavar="TEXT", type=Path, required=True, help="text file that is passed through the model, UTF-8, like what it will read")
    _add_text(calibrate)
    _add_modules(calibrate)
    _add_memory_limit(calibrate)
    _add_restart(calibrate)
    _add_common(calibrate)

    merge = commands.add_parser("merge", help="make one folder of Hessians of several", description="Add up the Hessians of several texts on one model, in the order given.", formatter_class=formatter)
    merge.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist")
    merge.add_argument("folders", metavar="FOLDER", type=Path, nargs="+", help="folders that `mrgptq calibrate` wrote")

    study = commands.add_parser("study", help="a page on what the formats lose and why rotations help one of them", description=_STUDY, formatter_class=formatter)
    study.add_argument("model", metavar="MODEL", type=Path, nargs="?", help="folder of a model whose weights are measured, too")
    study.add_argument("--out", metavar="FILE", type=Path, required=True, help="page to write, HTML; must not exist")
    study.add_argument("--values", metavar="N", type=_positive, default=1 << 21, help="values drawn for each number (default: 2097152)")
    study.add_argument("--calibration", metavar="TEXT", type=Path, help="with --text: measure what RTN, SmoothQuant, QuaRot, AWQ, GPTQ, MR-GPTQ and best cost MODEL, calibrated on this text")
    study.add_argument("--text", metavar="TEXT", type=Path, help="text from elsewhere that they are measured on")
    study.add_argument("--windows", metavar="N", type=_positive, default=6, help="windows of 512 tokens of each text (default: 6)")
    study.add_argument("--methods", metavar="A,B", type=_names, help="of these alone: rtn, rtn-hadamard, smoothquant, quarot, awq, gptq, mr-gptq, best, best-hadamard (default: all)")
    study.add_argument("--formats", metavar="A,B", type=_names, help="in these: nvfp4, mxfp4, int4, mxint4, nvint4 (default: the first three)")
    _add_memory_limit(study, "; counted is what the methods take")
    study.add_argument("--seed", metavar="N", type=_natural, default=0, help="of the draws (default: 0)")
    _add_common(study)

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

    inspect = commands.add_parser("inspect", help="what a quantised checkpoint holds", description="Errors, bits, fallbacks and the histogram of scales of a quantised checkpoint.", formatter_class=formatter)
    inspect.add_argument("model", metavar="OUT", type=Path, help="quantised checkpoint")
    return parser


def _add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=_positive, default=65536, help="calibration tokens (default: 65536)")
    parser.add_argument("--sequence", type=_positive, default=512, help="tokens in a window (default: 512)")


def _add_modules(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--targets", metavar="REGEX", default=DEFAULT_TARGETS, help="modules to quantise (default: linear layers inside numbered blocks, without routers)")
    parser.add_argument("--ignore", metavar="REGEX", default=DEFAULT_IGNORE, help=f"modules to leave as they are (default: {DEFAULT_IGNORE})")


def _add_restart(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--restart", action="store_true", help="throw away what an earlier run to OUT left unfinished")


def _add_memory_limit(parser: argparse.ArgumentParser, more: str = "") -> None:
    parser.add_argument("--memory-limit", metavar="SIZE", type=_size, help=f"refuse at once what is expected to take more, such as 16GB{more}")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="torch device of the forward passes (default: cpu); the quantisation itself runs on the CPU")
    parser.add_argument("--threads", type=_positive, help="threads (default: OMP_NUM_THREADS, or all cores); codes do not depend on it, forward passes may in their last bits")


def _add_running(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("--no-kernels", dest="kernels", action="store_false", default=None, help="dequantise the weights and round inputs in float32 instead of multiplying by packed weights (default on another device than cpu)")


def _names(text: str) -> list[str]:
    """Names between commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _natural(text: str) -> int:
    """A whole number from 0 on."""
    return 0 if text == "0" else _positive(text)


def _positive(text: str) -> int:
    """A whole number from 1 on, 1e6 too."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not (1 <= value < 2**63 and value == int(value)):
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(value)


def _size(text: str) -> int:
    """A number of bytes: 16GB, 512MB, 1.5e10."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number, unit = (text[:-2], units[text[-2:].upper()]) if text[-2:].upper() in units else (text, 1)
    try:
        value = float(number) * unit
    except ValueError:
        value = 0
    if not 1 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 16GB, 512MB or 1.5e10")
    return int(value)
