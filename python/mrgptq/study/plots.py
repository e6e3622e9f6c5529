"""Pictures of measurements; the only file that imports matplotlib."""

import os
from collections.abc import Sequence

import matplotlib

from .accuracy import AccuracyRow

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 - the backend must be chosen first


def accuracy_chart(rows: Sequence[AccuracyRow], path: str | os.PathLike[str], *, title: str) -> None:
    """Perplexity of every row as points over the original's line, one panel for W4A16 and one for W4A4; the file's ending decides its type (.png, .svg, .pdf).

    rows : AccuracyRows. Read in black and white by the markers' shapes.
    """
    original = next(row for row in rows if row.format is None)
    methods = list(dict.fromkeys(row.recipe for row in rows if row.format))
    # marker, colour, and where the numbers stand: NVFP4 is the lower curve, so its numbers go below
    styles = {"nvfp4": ("o", "#1b6ca8", -15), "mxfp4": ("s", "#c8553d", 8)}
    figure, panels = pyplot.subplots(1, 2, figsize=(8.4, 3.8), sharey=True, layout="constrained")
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
    pyplot.close(figure)
