"""The model card and the record of the run that lie beside the weights."""

from collections.abc import Mapping

from ..display import align, format_number
from ..recipe import Recipe
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
    """The layers of a record ({module: report fields}) as aligned text, one line a layer."""
    header = ("layer", "method", "rows", "cols", "rel. error", "weight error", "damping", "dead", "fallback")
    fields = ("method", "rows", "cols", "relative_error", "weight_error", "damping", "dead_columns", "fallback")
    rows = [header] + [(name, *(format_number(report.get(field)) for field in fields)) for name, report in layers.items()]
    return align(rows, numeric=(2, 3, 4, 5, 6, 7))
