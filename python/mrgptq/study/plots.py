"""Pictures of measurements; the only file that imports matplotlib."""

import io
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.figure import Figure

from .analysis import Crossover, Mean
from .findings import RuleRow
from .weights import WeightRow

if TYPE_CHECKING:  # these import torch
    from .accuracy import AccuracyRow
    from .methods import GridRow

# Figures are made without pyplot, whose backend is the caller's: a notebook's own pictures would vanish under another.


def accuracy_chart(rows: "Sequence[AccuracyRow]", path: str | os.PathLike[str], *, title: str) -> None:
    """Perplexity of every row as points over the original's line, one panel for W4A16 and one for W4A4; the file's ending decides its type (.png, .svg, .pdf).

    rows : AccuracyRows. Read in black and white by the markers' shapes.
    """
    original = next(row for row in rows if row.format is None)
    methods = list(dict.fromkeys(row.recipe for row in rows if row.format))
    # marker, colour, and where the numbers stand: NVFP4 is the lower curve, so its numbers go below
    styles = {"nvfp4": ("o", "#1b6ca8", -15), "mxfp4": ("s", "#c8553d", 8)}
    figure = Figure(figsize=(8.4, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, activations in zip(panels, (False, True), strict=True):
        for format, (marker, colour, offset) in styles.items():
            cells = {row.recipe: row.perplexity for row in rows if row.format == format and bool(row.activations) == activations}
            present = [method for method in methods if method in cells]
            if not present:
                continue
            panel.plot([methods.index(m) for m in present], [cells[m] for m in present], marker=marker, color=colour, linewidth=1.2, markersize=7, label=format.upper())
            for method in present:
                panel.annotate(f"{cells[method]:.2f}", (methods.index(method), cells[method]), textcoords="offset points", xytext=(0, offset), ha="center", fontsize=8, color=colour)
        panel.axhline(original.perplexity, color="black", linestyle="--", linewidth=1)
        panel.annotate(f"original {original.perplexity:.2f}", (len(methods) - 1, original.perplexity), textcoords="offset points", xytext=(14, -12), ha="right", fontsize=8)
        panel.set_xticks(range(len(methods)), [m if m.startswith("best") else m.upper() for m in methods])
        panel.set_xlim(-0.4, len(methods) - 0.6)
        panel.margins(y=0.16)
        panel.set_title("W4A4" if activations else "W4A16", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("perplexity (lower is better)")
    panels[0].legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)


def rule_chart(rows: Sequence[RuleRow]) -> str:
    """SVG: for each format the relative error of Laplace values, plain and rotated, joined by a line."""
    figure = Figure(figsize=(8, 0.36 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(reversed(rows)):
        plain, rotated = 1e3 * row.laplace.mse.value, 1e3 * row.rotated.mse.value
        axes.plot([plain, rotated], [place, place], color="black", linewidth=1)
        axes.plot([plain], [place], marker="o", color="black", linestyle="none", label="as they are" if not place else None)
        axes.plot([rotated], [place], marker="s", color="white", markeredgecolor="black", linestyle="none", label="under a Hadamard" if not place else None)
    axes.set_yticks(range(len(rows)), [row.label for row in reversed(rows)])
    axes.set_xlabel("relative error of Laplace values, thousandths")
    axes.set_xlim(left=0)
    axes.grid(axis="x", linewidth=0.3)
    figure.legend(frameon=False, loc="outside upper right", ncols=2)
    return _svg(figure, "rule")


def crossover_chart(crossovers: Mapping[str, Sequence[Crossover]]) -> str:
    """SVG: error by group size, plain and rotated, a panel for each type of scale."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    panels = figure.subplots(1, len(crossovers), sharey=True, squeeze=False)
    for axes, (scale, rows) in zip(panels[0], crossovers.items(), strict=True):
        sizes = [row.group_size for row in rows]
        axes.plot(sizes, [1e3 * row.plain.value for row in rows], color="black", marker="o", label="as they are")
        axes.plot(sizes, [1e3 * row.rotated.value for row in rows], color="black", marker="s", markerfacecolor="white", linestyle="--", label="under a Hadamard")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_title(f"scale {scale}", fontsize=10)
        axes.set_xlabel("values in a group")
    panels[0][0].set_ylabel("relative error, thousandths")
    panels[0][0].legend(frameon=False)
    return _svg(figure, "crossover")


def tail_chart(tails: Mapping[str, Mapping[str, tuple[Mean, Mean]]]) -> str:
    """SVG: what a rotation gains, by distribution, a mark for each format."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    names = list(tails)
    for key in next(iter(tails.values())):
        marker, style = _MARKS[key]
        axes.plot(range(len(names)), [tails[name][key][0].value / tails[name][key][1].value for name in names], color="black", marker=marker, markerfacecolor="white", linestyle=style, label=key.upper())
    axes.axhline(1, color="black", linewidth=0.6)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("error as they are / under a Hadamard")
    axes.legend(frameon=False)
    return _svg(figure, "tail")


def mass_chart(mass: Mapping[str, Sequence[tuple[int, float, float]]]) -> str:
    """SVG: what is rounded to zero, by group size, on logarithmic axes."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    for (grid, rows), marker in zip(mass.items(), ("o", "s"), strict=False):
        for column, (name, style) in enumerate((("Laplace", "-"), ("Normal", "--")), start=1):
            axes.plot([row[0] for row in rows], [1 - row[column] for row in rows], color="black", marker=marker, markerfacecolor="black" if column == 1 else "white", linestyle=style, label=f"{grid}, {name}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("values in a group")
    axes.set_ylabel("share of Σ x² rounded to zero")
    axes.legend(frameon=False)
    return _svg(figure, "mass")


def layer_chart(layers: Sequence[WeightRow]) -> str:
    """SVG: what a rotation gains in each layer, against its groups' kurtosis."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    for key in layers[0].plain:
        marker, _ = _MARKS[key]
        losing = [row for row in layers if row.rotated[key] > 0]  # others have no ratio
        axes.plot([row.kurtosis for row in losing], [row.plain[key] / row.rotated[key] for row in losing], color="black", marker=marker, markerfacecolor="white", linestyle="none", label=key.upper())
    axes.axhline(1, color="black", linewidth=0.6)
    axes.set_xlabel("kurtosis of the layer's groups of 32")
    axes.set_ylabel("error as they are / under a Hadamard")
    axes.legend(frameon=False)
    return _svg(figure, "layer")


def method_chart(rows: "Sequence[GridRow]") -> str:
    """SVG: divergence by method, a mark for each format, W4A16 and W4A4 beside each other."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    methods, formats = (list(dict.fromkeys(values)) for values in ([row.method for row in rows], [row.format or "" for row in rows]))
    for axes, rounded in zip(panels, (False, True), strict=True):
        for key in formats:
            marker, style = _MARKS[key]
            cells = {row.method: row.divergence for row in rows if row.format == key and bool(row.activations) == rounded}
            present = [method for method in methods if method in cells]
            axes.plot([methods.index(method) for method in present], [cells[method] for method in present], color="black", marker=marker, markerfacecolor="white", linestyle=style, linewidth=0.8, label=key.upper())
        axes.set_xticks(range(len(methods)), methods, rotation=40, ha="right", fontsize=8)
        axes.set_ylim(bottom=0)
        axes.set_title("W4A4" if rounded else "W4A16", fontsize=10)
    panels[0].set_ylabel("KL(original || quantised), nats a token")
    panels[0].legend(frameon=False)
    return _svg(figure, "method")


_MARKS = {"mxfp4": ("s", "-"), "nvfp4": ("o", "--"), "int4": ("^", ":"), "mxint4": ("v", "-."), "nvint4": ("D", ":")}
"""A format has the same mark in every figure."""


def _svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element, text kept as text; the same figure gives the same characters. ``name`` begins its ids, which must be the page's only ones."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mrgptq"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    drawing = buffer.getvalue()
    return re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", drawing[drawing.index("<svg") :])
