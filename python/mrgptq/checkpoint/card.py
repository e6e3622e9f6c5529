"""The model card and the record of the run that lie beside the weights."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from ..display import align, format_number
from ..recipe import Recipe
from ..result import format_offsets
from .scheme import Scheme

RECORD_NAME = "mrgptq.json"


def model_card(scheme: Scheme, dialect: str, loaders: str, recipe: Recipe | None, name: str) -> str:
    """README.md of a quantised checkpoint, markdown. ``recipe`` may be None."""
    lines = [
        f"# {name}, {scheme.label}",
        "",
        f"Linear layers quantised to {scheme.format.upper()} ({4 + 8 / scheme.group_size:g} bits a weight) by mrgptq, stored in the dialect {dialect}.",
        "",
        "## What loads it",
        "",
        loaders,
        "",
    ]
    if scheme.rotation and dialect == "compressed-tensors":
        lines += [
            "With transformers:",
            "",
            "```python",
            "import json",
            "from compressed_tensors.transform import TransformConfig, apply_transform_config",
            "from transformers import AutoModelForCausalLM",
            "",
            'path = "..."  # this folder',
            "model = AutoModelForCausalLM.from_pretrained(path)",
            'transforms = json.load(open(path + "/config.json"))["quantization_config"]["transform_config"]',
            'for group in transforms["config_groups"].values():  # the weights are rotated already; only the inputs are left',
            '    group["apply"] = [apply for apply in group["apply"] if apply["location"] == "input"]',
            "apply_transform_config(model, TransformConfig.model_validate(transforms))",
            "```",
            "",
        ]
    if recipe is not None:
        lines += ["## How it was made", "", "```", repr(recipe), "```", ""]
    return "\n".join(lines)


def error_table(layers: Mapping[str, Mapping[str, object]]) -> str:
    """The layers of a record ({module: report fields}) as aligned text, one line a layer; the error by outputs, rotation and padding only where layers differ in them."""
    weighted = any(report.get("output_error") is not None for report in layers.values())
    fits = [name for name in ("rotation", "padding") if len({report.get(name) or 0 for report in layers.values()}) > 1]
    columns = ["method", "rows", "cols", *fits, "rounded_error", "relative_error", *(["rounded_output_error", "output_error"] if weighted else []), "rounds", "weight_error", "damping", "dead_columns", "fallback"]
    titles = {"rounded_error": "rounded", "relative_error": "rel. error", "rounded_output_error": "by outputs: rounded", "output_error": "error", "weight_error": "weight error", "dead_columns": "dead", "rotation": "Hadamard"}
    rows: list[tuple[str, ...]] = [("layer", *(titles.get(column, column) for column in columns))]
    for name, report in layers.items():
        damped = cast(Sequence[float], report.get("damped_errors") or ())
        cells = dict(report) | {"rounds": len(damped) - 1 if damped else None}
        rows.append((name, *(format_number(cells.get(column)) for column in columns)))
    notes = ["rounded: the relative error that plain absmax rounding would have had", *(["by outputs: the same two as the model's predictions mind them"] if weighted else []), "rounds: of refinement"]
    return align(rows, numeric=tuple(range(2, len(columns)))) + f"\n({'; '.join(notes)})"


def offset_table(layers: Mapping[str, Mapping[str, object]]) -> str:
    """Which scales won in each layer of a record, as steps from absmax with their share of the groups."""
    rows = [("layer", "stored scales, steps from absmax")]
    for name, report in layers.items():
        offsets = cast(Mapping[Any, int], report.get("scale_offsets") or {})
        rows.append((name, format_offsets(offsets) if offsets else "–"))
    return align(rows)
