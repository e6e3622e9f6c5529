"""One self-contained page of the study's findings: vector figures, tables, what each means in a sentence, and the commands that made them."""

import html
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
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
Laplace distribution, weights after a Hadamard rotation by the Normal one, both of variance 1 (Egiazarian et al. 2025, arXiv 2509.23202, section 3). Errors are Σ err² / Σ x² of a group, averaged over groups, in thousandths, where nothing else is said; ± is one standard
error of {findings.values:,} drawn values.</p>
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
    figure = figure.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)
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
        f"A Hadamard over the group makes MXFP4's error {_percent(mx_change)} and NVFP4's {_percent(nv_change)}. Unrotated, MXFP4's power-of-two scale leaves the largest value of a group off the grid (its relative error is {1e3 * mx.laplace.top.value:.1f} thousandths of its "
        f"square, NVFP4's {1e3 * nv.laplace.top.value:.1f}); a rotation spreads the errors over the group (of the largest value's {1e3 * mx.rotated.top.value:.1f} are left in MXFP4, {1e3 * nv.rotated.top.value:.1f} in NVFP4). With a real scale the largest value has no error before a "
        "rotation, and nearly the mean one after it: lemma 1, which takes what is rotated for independent of which value was the largest."
    )
    table = _table(
        [
            ("format, scale rule", "Laplace", "its largest value", "Laplace, rotated", "its largest value", "Normal", "Laplace, err² itself", "by an integral"),
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
    if format.search == "absmax" and format.scale != "e4m3":
        print(expected_error(format, Laplace()))
""")


def _percent(change: float) -> str:
    return f"{abs(100 * change):.0f} % {'smaller' if change < 0 else 'larger'}"


def _crossovers(findings: Findings) -> str:
    rows = findings.crossovers["e4m3"]
    sides: dict[str, list[str]] = {"helps": [], "does harm": [], "cannot be told apart from none": []}
    for row in rows:
        z = (row.plain.value - row.rotated.value) / np.hypot(row.plain.standard_error, row.rotated.standard_error)
        sides["helps" if z > 2 else "does harm" if z < -2 else "cannot be told apart from none"].append(str(row.group_size))
    where = "; ".join(f"{what} in groups of {', '.join(sizes)}" for what, sizes in sides.items() if sizes)
    table = _table([("group size", *(f"{scale}, {kind}" for scale in findings.crossovers for kind in ("plain", "rotated"))), *((str(size), *(_thousandths(mean) for rows in findings.crossovers.values() for row in rows if row.group_size == size for mean in (row.plain, row.rotated))) for size in (row.group_size for row in rows))])
    return _section(
        "By group size",
        f"With E4M3 scales a rotation {where} (by two standard errors). In a small group the largest value, which such a scale puts on the grid nearly exactly, holds much of the square, and a rotation spreads it over values that are rounded; in a large one it is so far out that the rest is rounded coarsely, and a rotation draws it in.",
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
    mixing = {key: [row.errors[key].value for row in findings.transforms if row.name not in ("identity", "fastfood")] for key in keys}
    said = ", ".join(f"{100 * (max(values) / min(values) - 1):.0f} % ({key.upper()})" for key, values in mixing.items())
    return _section(
        "Which rotation",
        f"Between the best and the worst of the orthogonal families that mix a whole group lie {said} of the error. Fastfood is not orthogonal: turning back enlarges errors, and by how much depends on the matrix that was drawn. Of random families eight matrices are tried, and ± is of the mean over those.",
        "",
        "",
        _table([("rotation over the group", *(key.upper() for key in keys)), *((row.name, *(_thousandths(row.errors[key]) for key in keys)) for row in findings.transforms)]),
        f"""
from mrgptq.study.analysis import simulate_transform
from mrgptq.study.distributions import Laplace
from mrgptq.study.grids import FORMATS
from mrgptq.transforms import TRANSFORMS

for name in TRANSFORMS:
    for key in {tuple(keys)}:
        print(name, key, simulate_transform(FORMATS[key], Laplace(), name, {_draws(findings)}))
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
    pairs = [pair for rows in findings.mass.values() for _, *pair in rows]
    seen = "Normal values keep more in large groups; on these two grids, whose δ is small, at every size." if all(normal > laplace for laplace, normal in pairs) else "Normal values keep more in large groups, Laplace values in small ones."
    return _section(
        "What is not rounded to zero",
        "Values below half the smallest step vanish. The share of Σ x² that is left falls like (log G)² G^−δ for Laplace and √log G G^(−δ²) for Normal values, δ being half the smallest step over the largest value (lemma 2). " + seen,
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
    steps = [step for step in _STEPS if any((step[0], *kind) in cells and (step[1], *kind) in cells for kind in kinds)]
    ladder = {kind: [_step(cells, kind, *step) for step in steps if step in _STEPS[1:3]] for kind in kinds}
    outcome: dict[str, list[str]] = {"comes out": [], "cannot be told in": [], "does not come out in": []}
    for kind, found in ladder.items():
        if known := [change for change in found if change]:
            worst = "does not come out in" if any(change.rises for change in known) else "comes out" if all(change.falls for change in known) else "cannot be told in"
            outcome[worst].append(_kind(*kind))
    turned = [f"{_kind(*kind)} {change}" for kind in kinds if (change := _step(cells, kind, *_STEPS[0]))]
    sentences = [f"A Hadamard before plain rounding: {'; '.join(turned)}."] if turned else []
    if any(outcome.values()):
        words = "; ".join(f"{what} {', '.join(found)}" if what != "comes out" else f"comes out in {', '.join(found)}" for what, found in outcome.items() if found)
        sentences.append(f"That the divergence falls from GPTQ to MR-GPTQ and from MR-GPTQ to best, where each was measured, {words}.")
    if steps:
        sentences.append(f"Differences are of the divergence, ± one standard error over {len(rows[0].window_divergences)} windows of the text; what is less than two of those says nothing, and calibration on another text would move it too. Perplexity and layer error, below, need not order methods alike.")
    changes = _table([("divergence against", *(f"{after}, over {before}" for before, after in steps)), *((_kind(*kind), *(str(_step(cells, kind, *step) or "–") for step in steps)) for kind in kinds)]) if steps else ""
    names = list(dict.fromkeys(row.method for row in rows))
    divergences = _table([("KL(original || quantised), nats a token", *(_kind(*kind) for kind in kinds)), *((name, *(f"{cells[name, *kind].divergence:.4f}" if (name, *kind) in cells else "–" for kind in kinds)) for name in names)])
    everything = _table(
        [
            ("method", "format", "activations", "layer error", "perplexity", "divergence"),
            ("original", "", "", "", f"{original.perplexity:.3f}", ""),
            *((row.method, (row.format or "").upper(), "W4A4" if row.activations else "W4A16", "–" if row.relative_error is None else f"{row.relative_error:.2e}", f"{row.perplexity:.3f}", f"{row.divergence:.4f}") for row in rows),
        ]
    )
    table = f"{divergences}\n{changes}\n<details><summary>Layer errors and perplexities</summary>{everything}</details>"
    return _section("What each method costs this model", " ".join(sentences), method_chart(rows), "Divergence from the original's predictions, by method; a mark for each format, weights alone to the left, inputs too to the right. Lower is better.", table)


_STEPS = (("rtn", "rtn-hadamard"), ("gptq", "mr-gptq"), ("mr-gptq", "best"), ("mr-gptq", "best-hadamard"))
"""What is compared, one method with another: does a rotation help plain rounding; the published order."""


@dataclass(frozen=True)
class _Change:
    """How much larger or smaller a divergence is than another, relative to that."""

    value: float
    standard_error: float

    @property
    def falls(self) -> bool:
        """By more than chance."""
        return self.value < 0 and not abs(self.value) < 2 * self.standard_error

    @property
    def rises(self) -> bool:
        """By more than chance."""
        return self.value > 0 and not abs(self.value) < 2 * self.standard_error

    def __str__(self) -> str:
        """As the page says it."""
        known = f" (± {100 * self.standard_error:.0f} %)" if np.isfinite(self.standard_error) else ""
        return _percent(self.value) + known


def _step(cells: "Mapping[tuple[str, str | None, bool], GridRow]", kind: tuple[str | None, bool], before: str, after: str) -> _Change | None:
    """From one method to another; None where one is not there, or the first loses nothing: a model of zeros."""
    first, second = (cells.get((method, *kind)) for method in (before, after))
    if not first or not second or first.divergence <= 0:
        return None
    difference = second.divergence_over(first)
    return _Change(difference.value / first.divergence, difference.standard_error / first.divergence)


def _kind(format: str | None, rounded: bool) -> str:
    return f"{(format or '').upper()} W4A{4 if rounded else 16}"
