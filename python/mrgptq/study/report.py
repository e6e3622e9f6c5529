"""One self-contained page of the study's findings: vector figures, tables, what each means in a sentence, and the commands that made them."""

import html
import os
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoint.partial_run import temporary
from ..checkpoint.safetensors import new_file, writing
from .analysis import Mean
from .findings import GROUP_KURTOSIS, Findings
from .plots import crossover_chart, layer_chart, mass_chart, method_chart, rule_chart, tail_chart
from .weights import rotation_gain

if TYPE_CHECKING:  # imports torch
    from .methods import GridRow

_STYLE = """
body { font: 16px/1.5 Georgia, serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; color: #111; background: #fff }
h1, h2 { font-family: Helvetica, Arial, sans-serif; line-height: 1.2 } h2 { margin-top: 2.5rem }
figure { margin: 1rem 0 } figure svg { width: 100%; height: auto } figcaption { font-size: .95rem }
table { border-collapse: collapse; font: 14px/1.4 Helvetica, Arial, sans-serif; margin: 1rem 0 } th { border-bottom: 1px solid #111; text-align: right; padding: .2rem .7rem }
td { text-align: right; padding: .15rem .7rem; white-space: nowrap } th:first-child, td:first-child { text-align: left; padding-left: 0 } .scroll { overflow-x: auto }
code, pre { font: 13px/1.4 monospace; background: #f2f2f2 } pre { padding: .6rem; overflow-x: auto } summary { cursor: pointer; font: 14px/1.4 Helvetica, Arial, sans-serif }
"""


def write_report(findings: Findings, path: str | os.PathLike[str], command: Sequence[str]) -> None:
    """Write the page, UTF-8, nothing in it from elsewhere; the file has its name only once it is whole.

    Parameters
    ----------
    findings : Findings. path : the file, which must not exist. command : the arguments that made it, for the reader to repeat.

    Raises
    ------
    FileExistsError : the file is there. OSError : it cannot be written.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists already and is not overwritten")
    text, unfinished = page(findings, command), temporary(path)
    with new_file(unfinished) as file:
        file.write(text.encode())
    with writing(path):
        os.replace(unfinished, path)


def page(findings: Findings, command: Sequence[str]) -> str:
    """The HTML."""
    sections = [_rules, _crossovers, _transforms, _tails, _mass, *([_layers] if findings.layers else []), *([_methods] if findings.methods else [])]
    body = "\n".join(section(findings) for section in sections)
    title = "Why rotations help MXFP4 and not NVFP4"
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>{_STYLE}</style></head>
<body>
<h1>{title}</h1>
<p>A 4-bit block format keeps a code a value and one scale a group. What rounding to it loses depends on how the values of a group are spread, on how many share a scale, and on how the scale itself is rounded. Weights are modelled by the
Laplace distribution, weights after a Hadamard rotation by the Normal one, both of variance 1 (Egiazarian et al. 2025, arXiv 2509.23202, section 3). Errors are Σ err² / Σ x² of a group, averaged over groups, in thousandths; ± is one standard error
of {findings.values:,} drawn values.</p>
{body}
<h2>How it was made</h2>
<p>Everything above comes from one command of mrgptq {version("mrgptq")}; the same seed gives the same numbers. In Python <code>mrgptq.study.findings.collect</code> gives all at once but what methods cost a model, which is <code>mrgptq.study.methods.grid</code>'s; <code>mrgptq.study.plots</code> draws the figures from both.</p>
<pre>{html.escape(shlex.join(["mrgptq", *command]))}</pre>
</body>
</html>
"""


def _thousandths(mean: Mean, digits: int = 2) -> str:
    return f"{1e3 * mean.value:.{digits}f} ± {1e3 * mean.standard_error:.{digits}f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the header."""
    header, *rest = [[html.escape(cell) for cell in row] for row in rows]
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in header) + "</tr>", *("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rest)]
    return '<div class="scroll"><table>' + "\n".join(lines) + "</table></div>"


def _section(title: str, meaning: str, figure: str, caption: str, table: str, code: str = "") -> str:
    """``code``: Python that prints the table's numbers."""
    picture = f"<figure>{figure}<figcaption>{html.escape(caption)}</figcaption></figure>" if figure else ""
    how = f"<details><summary>These numbers in Python</summary><pre>{html.escape(code.strip())}</pre></details>" if code else ""
    return f"<h2>{html.escape(title)}</h2>\n<p>{html.escape(meaning)}</p>\n{picture}\n{table}\n{how}"


def _draws(findings: Findings) -> str:
    """The arguments of a draw, as they are written."""
    return f"values={findings.values}, seed={findings.seed}"


def _rules(findings: Findings) -> str:
    rows = {row.label: row for row in findings.rules}
    mx, nv = rows["MXFP4 even"], rows["NVFP4 absmax"]
    mx_change, nv_change = (row.rotated.mse.value / row.laplace.mse.value - 1 for row in (mx, nv))
    meaning = (
        f"A Hadamard over the group makes MXFP4's error {_percent(mx_change)} and NVFP4's {_percent(nv_change)}. Unrotated, MXFP4's power-of-two scale moves the largest value of a group off the grid (a relative error of {1e3 * mx.laplace.top.value:.1f} thousandths of its "
        f"square, NVFP4's {1e3 * nv.laplace.top.value:.1f}); a rotation spreads that over the group ({1e3 * mx.rotated.top.value:.1f} are left), which is lemma 1. NVFP4's finer scale has little to spread, and its groups of 16 are too short for a rotation to pay."
    )
    table = _table(
        [
            ("format, scale rule", "Laplace", "its largest value", "Laplace, rotated", "its largest value", "Normal", "absolute, drawn", "by an integral"),
            *(
                (row.label, _thousandths(row.laplace.mse), _thousandths(row.laplace.top), _thousandths(row.rotated.mse), _thousandths(row.rotated.top), _thousandths(row.normal.mse), _thousandths(row.laplace.absolute), "–" if row.expected is None else f"{1e3 * row.expected:.2f}")
                for row in findings.rules
            ),
        ]
    )
    return _section("What each format loses", meaning, rule_chart(findings.rules), "Relative error of Laplace values as they are (circles) and under a Hadamard over the group (squares); a line to the left means that the rotation helps.", table, f"""
from mrgptq import Hadamard
from mrgptq.study.analysis import expected_error, simulate
from mrgptq.study.distributions import Laplace, Normal
from mrgptq.study.findings import RULES

for label, format in RULES.items():
    plain = simulate(format, Laplace(), {_draws(findings)})
    rotated = simulate(format, Laplace(), Hadamard(format.group_size), {_draws(findings)})
    normal = simulate(format, Normal(), {_draws(findings)})
    print(label, plain.mse, plain.top, rotated.mse, rotated.top, normal.mse, plain.absolute)
print(expected_error(RULES["MXFP4 even"], Laplace()))
""")


def _percent(change: float) -> str:
    return f"{abs(100 * change):.0f} % {'smaller' if change < 0 else 'larger'}"


def _crossovers(findings: Findings) -> str:
    rows = findings.crossovers["e4m3"]
    first = next((row.group_size for row in rows if row.rotated.value < row.plain.value), None)
    where = f"from groups of {first} on" if first else "at none of these sizes"
    table = _table([("group size", *(f"{scale}, {kind}" for scale in findings.crossovers for kind in ("plain", "rotated"))), *((str(size), *(_thousandths(mean) for rows in findings.crossovers.values() for row in rows if row.group_size == size for mean in (row.plain, row.rotated))) for size in (row.group_size for row in rows))])
    return _section(
        "By group size",
        f"With E4M3 scales a rotation helps {where}. In a small group a Laplace value is mostly far below the largest, where E2M1's steps are fine; in a large one the largest is so far out that much of the rest is rounded coarsely, and a rotation draws it in.",
        crossover_chart(findings.crossovers),
        "Relative error of E2M1 by group size, Laplace values as they are (solid) and under a Hadamard over the group (dashed), a panel for each type of scale.",
        table,
        f"""
from mrgptq.study.analysis import crossover
from mrgptq.study.grids import E2M1, StudyFormat

for scale in {tuple(findings.crossovers)}:
    for row in crossover(StudyFormat(E2M1, 16, scale), {_draws(findings)}):
        print(scale, row.group_size, row.plain, row.rotated)
""",
    )


def _transforms(findings: Findings) -> str:
    keys = list(findings.transforms[0].errors)
    return _section(
        "Which rotation",
        "All orthogonal families that mix a whole group do about the same: what counts is that values become Normal, not how. Fastfood is not orthogonal, so turning back enlarges the errors.",
        "",
        "",
        _table([("rotation over the group", *(key.upper() for key in keys)), *((row.name, *(_thousandths(row.errors[key]) for key in keys)) for row in findings.transforms)]),
        f"""
from mrgptq import transform
from mrgptq.study.analysis import simulate
from mrgptq.study.distributions import Laplace
from mrgptq.study.grids import FORMATS
from mrgptq.transforms import TRANSFORMS

for name in TRANSFORMS:
    for key in {tuple(keys)}:
        rotation = transform(name, FORMATS[key].group_size, seed={findings.seed})
        print(name, key, simulate(FORMATS[key], Laplace(), rotation, {_draws(findings)}).mse)
""",
    )


def _tails(findings: Findings) -> str:
    keys = list(next(iter(findings.tails.values())))
    others = [name for name in findings.tails if name != "Normal"]
    gains = {key: [findings.tails[name][key][0].value / findings.tails[name][key][1].value for name in others] for key in keys}
    said = "; ".join(f"{key.upper()} {min(values):.2f} to {max(values):.2f}" for key, values in gains.items())
    return _section(
        "By the weight of the tails",
        f"Of Normal values a rotation makes Normal ones, and nothing changes. Of values with heavier tails it divides the error by: {said}.",
        tail_chart(findings.tails),
        "Error without a Hadamard over the group divided by the error with one: above 1 the rotation helps.",
        _table([("distribution", *(f"{key.upper()}, {kind}" for key in keys for kind in ("plain", "rotated"))), *((name, *(_thousandths(mean) for key in keys for mean in cells[key])) for name, cells in findings.tails.items())]),
        f"""
from mrgptq import Hadamard
from mrgptq.study.analysis import simulate
from mrgptq.study.distributions import Laplace, Normal, StudentT
from mrgptq.study.grids import FORMATS

for distribution in (Normal(), Laplace(), StudentT(5), StudentT(3)):
    for key in {tuple(keys)}:
        for rotation in (None, Hadamard(FORMATS[key].group_size)):
            print(distribution.name, key, simulate(FORMATS[key], distribution, rotation, {_draws(findings)}).mse)
""",
    )


def _mass(findings: Findings) -> str:
    return _section(
        "What is not rounded to zero",
        "Values below half the smallest step vanish. The share of Σ x² that is left falls like (log G)² G^−δ for Laplace and √log G G^(−δ²) for Normal values, δ being half the smallest step over the largest value (lemma 2): Normal values keep more in large groups, whatever the grid.",
        mass_chart(findings.mass),
        "What is lost to zero, one minus the preserved mass, by group size, the scale being real: by an integral, without drawing.",
        _table([("group size", *(f"{grid}, {name}" for grid in findings.mass for name in ("Laplace", "Normal"))), *((str(size), *(f"{value:.6f}" for rows in findings.mass.values() for s, *pair in rows if s == size for value in pair)) for size, _, _ in next(iter(findings.mass.values())))]),
        f"""
from mrgptq.study.analysis import preserved_mass
from mrgptq.study.distributions import Laplace, Normal
from mrgptq.study.grids import E2M1, INT4

for size in {tuple(size for size, _, _ in next(iter(findings.mass.values())))}:
    for grid in (E2M1, INT4):
        print(size, preserved_mass(grid, size, Laplace()), preserved_mass(grid, size, Normal()))
""",
    )


def _layers(findings: Findings) -> str:
    gains = {key: rotation_gain(findings.layers, key) for key in findings.layers[0].plain}
    helped = {key: sum(row.rotated[key] < row.plain[key] for row in findings.layers) for key in gains}
    meaning = f"{Path(findings.model or '').name}: a Hadamard over the group divides the weights' error by " + ", ".join(f"{gain:.3f} ({key.upper()}, {helped[key]} of {len(findings.layers)} layers gain)" for key, gain in gains.items()) + ". The kurtosis of its groups says how near to Normal or Laplace values they are already, " + f"which have {GROUP_KURTOSIS['Normal']:.2f} and {GROUP_KURTOSIS['Laplace']:.2f} in groups of 32."
    for why in dict.fromkeys(findings.left_out.values()):
        names = [name for name, reason in findings.left_out.items() if reason == why]
        meaning += f" Not among them, since {why}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}."
    return _section(
        "This model's own weights",
        meaning,
        layer_chart(findings.layers),
        "Each layer's error without a Hadamard over that with one, against the kurtosis of its groups of 32: above 1 the rotation helps.",
        _table([("layer", "kurtosis", *(f"{key.upper()}, {kind}" for key in gains for kind in ("plain", "rotated"))), *((row.name, f"{row.kurtosis:.2f}", *(f"{1e3 * cells[key]:.2f}" for key in gains for cells in (row.plain, row.rotated))) for row in findings.layers)]),
        f"""
from mrgptq.study.weights import weight_rows

for row in weight_rows({findings.model!r}):
    print(row)
""",
    )


def _methods(findings: Findings) -> str:
    original, *rows = findings.methods
    cells = {(row.method, row.format, bool(row.activations)): row for row in rows}
    kinds = list(dict.fromkeys((row.format, bool(row.activations)) for row in rows))
    sentences = []
    for format, rounded in kinds:
        plain, turned = (cells.get((method, format, rounded)) for method in ("rtn", "rtn-hadamard"))
        if rounded and plain and turned:
            sentences.append(f"{_kind(format, rounded)}: a Hadamard before plain rounding makes the divergence {_change(turned, plain)}.")
    held: list[str] = []
    not_held: list[str] = []
    for format, rounded in kinds:
        steps = [cells[method, format, rounded] for method in ("gptq", "mr-gptq", "best") if (method, format, rounded) in cells]
        rises = [f"{after.method}'s is {_change(after, before)} than {before.method}'s" for before, after in pairwise(steps) if after.divergence >= before.divergence]
        turned_best = cells.get(("best-hadamard", format, rounded))
        if turned_best and len(steps) == 3 and steps[2].divergence >= steps[1].divergence:
            rises.append(f"under a Hadamard best's is {_change(turned_best, steps[1])} than mr-gptq's")
        if rises:
            not_held.append(f"{_kind(format, rounded)} ({', '.join(rises)})")
        elif len(steps) > 1:
            held.append(_kind(format, rounded))
    if held or not_held:
        sentences.append("From GPTQ to MR-GPTQ to best, where each is there, the divergence falls" + (f" in {', '.join(held)}" if held else "") + (f"; not in {', '.join(not_held)}" if not_held else "") + ".")
    if len(rows[0].window_divergences) > 1:
        sentences.append(f"± is one standard error of the difference over {len(rows[0].window_divergences)} windows of the text, the calibration being one.")
    names = list(dict.fromkeys(row.method for row in rows))
    divergences = _table([("KL(original || quantised), nats a token", *(_kind(*kind) for kind in kinds)), *((name, *(f"{cells[name, *kind].divergence:.4f}" if (name, *kind) in cells else "–" for kind in kinds)) for name in names)])
    everything = _table(
        [
            ("method", "format", "activations", "layer error", "perplexity", "divergence"),
            ("original", "", "", "", f"{original.perplexity:.3f}", ""),
            *((row.method, (row.format or "").upper(), "W4A4" if row.activations else "W4A16", "–" if row.relative_error is None else f"{row.relative_error:.2e}", f"{row.perplexity:.3f}", f"{row.divergence:.4f}") for row in rows),
        ]
    )
    table = f"{divergences}\n<details><summary>Layer errors and perplexities</summary>{everything}</details>"
    return _section("What each method costs this model", " ".join(sentences), method_chart(rows), "Divergence from the original's predictions, by method; a mark for each format, weights alone to the left, inputs too to the right. Lower is better.", table)


def _change(row: "GridRow", other: "GridRow") -> str:
    """How much larger or smaller a divergence is than another, in percent of that, which need not be there: a model of zeros loses nothing."""
    if other.divergence <= 0:
        return "no smaller"
    difference = row.divergence_over(other)
    known = f" (± {100 * difference.standard_error / other.divergence:.0f} %)" if np.isfinite(difference.standard_error) else ""
    return _percent(difference.value / other.divergence) + known


def _kind(format: str | None, rounded: bool) -> str:
    return f"{(format or '').upper()} W4A{4 if rounded else 16}"
