"""A quantisation method as a value: it prints, compares, becomes JSON and travels into the checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from .arrays import as_number, choose
from .codecs import HESSIAN_SEARCHES, resolve_scales, scales_name
from .display import Shown
from .formats import block_format
from .gptq import ORDERS, PRECISIONS, as_damping
from .rotations import Identity, Rotation, rotation_of

SOLVERS = ("rtn", "gptq")
BEST_ROUNDS, BEST_DAMPING, BEST_CROSS, ROUNDED_CROSS = 6, 0.05, 0.4, 0.1
"""Of the recipes "best" and "best-online"; bench/accuracy.md has the figures that chose them."""
NAMES = ("rtn", "gptq", "mr-gptq", "best", "best-online")
DIALECTS = ("compressed-tensors", "fp_quant", "mrgptq")
TENSOR_SCALES = ("absmax", "alternating")
OUTPUT_HESSIANS = (None, "fisher")


@dataclass(frozen=True, repr=False)
class Recipe(Shown):
    """How a layer is quantised; ``dataclasses.replace(recipe, field=value)`` makes a changed one.

    Attributes
    ----------
    format : "nvfp4" or "mxfp4".
    rotation : block size of the Hadamard rotation, a power of two from 2 on; None for none. A layer whose columns it does not divide takes the largest power of two in it that does, which its report tells.
    scales : a rule of ``quantize``, or one that needs the Hessian: "hessian" and "hessian_block" are "mse" with the errors weighed by the diagonal of H or by the group's block of it
        (H-Scale; ModelOpt's local Hessian); "gptq" tries the storable scales when GPTQ reaches the group and keeps the one that loses least there (ours; needs the order "group").
    mx_rule : how MXFP4 rounds scales to powers of two. compressed-tensors and vLLM assume "even" for activations; only fp_quant stores "four-thirds".
    tensor_scale : of NVFP4: "absmax" is 2688 / amax; "alternating" is fitted in turn with the group scales, see ``alternating_tensor_scale`` (by the rule "mse" where ``scales`` needs a Hessian).
    order : "activation", "group" or "natural", see ``Factor``. solver : "gptq", or "rtn" for plain rounding.
    damping : λ / mean(diag H), >= 0.
    rounds : rounds of block coordinate descent on scales and codes after GPTQ; need the order "group".
    cross : 0 … 1, how far a layer's target moves from W to what answers the quantised model's inputs most nearly as W answers the original's. Used where the cross moment is at hand:
        calibration of a model collects it, by a second pass through the original blocks, and with it what the residual stream has lost, which the layers that write into it make up for by as much;
        ``quantize_layer`` takes both, as ``cross`` and ``stream``. 0 for not at all.
    output_hessian : "fisher" has calibration of a model measure how much its predictions mind each output of a layer, by backward passes, and rows make up for each other's errors
        accordingly; None: outputs count alike and rows are independent. ``quantize_layer`` takes such a matrix as ``output_hessian``.
    activations : None for W4A16; the format's own name for W4A4.
    activation_rule : how the scale of a group of inputs is found: "absmax" (for MXFP4 by ``mx_rule``), or another rule of ``quantize`` such as "mse" or, for MXFP4, "even". Stock
        loaders know absmax and even alone; only the dialect "mrgptq" stores the others.
    precision : of GPTQ's errors and feedback, and of the products in its factor. "float64": equal to ``mrgptq.reference`` code for code, unless H is close to singular and the damping 0: then
        the order of sums shows. "float32": faster; a row may part from the reference where a value lies within float32 rounding of a tie. Of 30 720 rows of two models' layers, under five recipes, 8
        parted; a layer of 128 rows then had an error up to 4e-3 of itself larger or smaller, and an output error 2 % once in 222 random problems. Where losses do not fit float32 a layer is
        computed in float64 and its report says so; a factor whose pivots float32 would blur takes float64 products.
    pad : True adds columns of zeros to a layer whose columns no group divides, as many as it lacks; only the dialect "mrgptq" stores such layers. Where inputs are rounded too they are not rotated. False refuses them.

    Raises
    ------
    ValueError : names the field, what was given and what is allowed.
    """

    format: str = "nvfp4"
    rotation: int | None = None
    scales: str | None = "fpquant_mse"
    mx_rule: str = "even"
    tensor_scale: str = "absmax"
    order: str = "activation"
    solver: str = "gptq"
    damping: float = 0.01
    rounds: int = 0
    cross: float = 0.0
    output_hessian: str | None = None
    activations: str | None = None
    activation_rule: str = "absmax"
    precision: str = "float64"
    pad: bool = False

    def __post_init__(self) -> None:
        block_format(self.format)
        object.__setattr__(self, "rotation", rotation_of(self.rotation).block_size)  # a plain int, so that a NumPy one becomes JSON too
        resolve_scales(self.format, self.scales, self.mx_rule, more=(*HESSIAN_SEARCHES, "gptq"))
        choose(f"tensor_scale for {self.format}", self.tensor_scale, TENSOR_SCALES if self.format == "nvfp4" else ("absmax",))
        choose("order", self.order, ORDERS)
        choose("solver", self.solver, SOLVERS)
        object.__setattr__(self, "damping", as_damping(self.damping))
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, (int, np.integer)) or not 0 <= self.rounds <= 1000:
            raise ValueError(f"rounds is {self.rounds!r}; it must be an integer from 0 to 1000")
        object.__setattr__(self, "rounds", int(self.rounds))
        if self.scales == "gptq" or self.rounds:
            asked = 'scales "gptq"' if self.scales == "gptq" else f"rounds {self.rounds}"
            if self.solver != "gptq":
                raise ValueError(f'{asked} needs the solver "gptq"; the recipe has {self.solver!r}')
            if self.order != "group":
                raise ValueError(f'{asked} needs the order "group"; the recipe has {self.order!r}')
        object.__setattr__(self, "cross", as_number(self.cross, "cross"))
        if not 0 <= self.cross <= 1:
            raise ValueError(f"cross is {self.cross!r}; it must be from 0 to 1")
        if self.cross and self.solver != "gptq":
            raise ValueError(f'cross {self.cross:g} needs the solver "gptq"; the recipe has {self.solver!r}')
        choose("output_hessian", self.output_hessian, OUTPUT_HESSIANS)
        if self.output_hessian and self.solver != "gptq":
            raise ValueError(f'output_hessian {self.output_hessian!r} needs the solver "gptq"; the recipe has {self.solver!r}')
        choose(f"activations for {self.format}", self.activations, (None, self.format))
        resolve_scales(self.format, self.activation_rule, self.mx_rule, name="activation_rule")
        choose("precision", self.precision, PRECISIONS)
        if not isinstance(self.pad, bool):
            raise TypeError(f"pad is {self.pad!r}; it must be True or False")

    @classmethod
    def named(cls, name: str, format: str = "nvfp4", dialect: str = "compressed-tensors", activations: str | None = None) -> "Recipe":
        """A recipe by name, with what the dialect asks for.

        Parameters
        ----------
        name : "rtn": absmax scales and plain rounding. "gptq": absmax scales, activation order. "mr-gptq": the paper as its authors ship it: Hadamard 16 (NVFP4) or
            32 (MXFP4), fpquant_mse scales, activation order. "best": scales chosen inside GPTQ, refined; what measured best (bench/accuracy.md) among what the dialect's stock
            loaders carry out, so without a rotation in compressed-tensors. "best-online": also an online rotation and another activation rule where they pay, which is at W4A4; then
            the dialect "mrgptq" stores it for our own runtime. "fp_quant", which rotates anyway and knows no other activation rule, gets "best".
        dialect : "fp_quant" stores MXFP4 by four-thirds, "compressed-tensors" and "mrgptq" by even.
        """
        choose("recipe", name, NAMES)
        choose("dialect", dialect, DIALECTS)
        mx_rule = "four-thirds" if dialect == "fp_quant" and format == "mxfp4" else "even"
        base = cls(format=format, scales="absmax", mx_rule=mx_rule, activations=activations)
        if name == "rtn":
            return replace_checked(base, solver="rtn", order="natural")
        if name == "gptq":
            return base
        if name == "mr-gptq":
            return replace_checked(base, rotation=block_format(format).group_size, scales="fpquant_mse")
        best = replace_checked(base, scales="gptq", order="group", rounds=BEST_ROUNDS, damping=BEST_DAMPING, output_hessian="fisher", precision="float32")
        best = replace_checked(best, cross=BEST_CROSS if activations is None else ROUNDED_CROSS)
        # At W4A4 the inputs' rounding decides, and MXFP4's is better in a rotated basis, NVFP4's in the original one. Loaders of fp_quant always rotate.
        rotated = format == "mxfp4" and activations is not None and (name == "best-online" or dialect == "fp_quant")
        searched = activations is not None and name == "best-online" and dialect != "fp_quant"
        return replace_checked(best, rotation=32 if rotated else None, activation_rule="mse" if searched else "absmax")

    def fit(self, cols: int, name: str = "weight") -> tuple[int, Rotation]:
        """(columns of zeros that are added, rotation) of a layer of so many columns; ValueError, by ``name``, where no group divides them and ``pad`` is False."""
        group_size = block_format(self.format).group_size
        if cols % group_size and not self.pad:
            raise ValueError(f"{name} has {cols} columns; {self.format} needs a multiple of {group_size}, or zeros behind them: pad=True, --pad, which the dialect mrgptq stores")
        padding = -cols % group_size
        # Rounded in a turned basis zeros do not stay zeros, and whoever dequantises weights to a layer's own columns would lose their share.
        return padding, Identity() if padding and self.activations else rotation_of(self.rotation, cols + padding)

    @property
    def resolved_mx_rule(self) -> str:
        """The MX rule that rounds the weights' scales, "even" where the format has none."""
        return self.resolved_scales[1]

    @property
    def resolved_scales(self) -> tuple[str, str]:
        """(search, MX rule) of the weights' scales."""
        return resolve_scales(self.format, self.scales, self.mx_rule, more=(*HESSIAN_SEARCHES, "gptq"))

    @property
    def activation_scales(self) -> tuple[str, str]:
        """(search, MX rule) of the inputs' scales."""
        return resolve_scales(self.format, self.activation_rule, self.mx_rule)

    def as_dict(self) -> dict[str, Any]:
        """Plain values by field name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.as_dict())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`as_dict`; unknown fields are refused by name."""
        known = [f.name for f in fields(cls)]
        for name in values:
            choose("recipe field", name, tuple(known))
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of :meth:`to_json`."""
        return cls.from_dict(json.loads(text))

    def _title(self) -> str:
        return f"Recipe for {self.format}, W4A{4 if self.activations else 16}"

    def _rows(self) -> list[tuple[str, object]]:
        rows: list[tuple[str, object]] = [("rotation", "none" if self.rotation is None else f"Hadamard {self.rotation}"), ("scales", scales_name(self.format, *self.resolved_scales)), ("solver", self.solver)]
        if self.solver == "gptq":
            rows += [("order", self.order), ("rounds", self.rounds), ("damping", self.damping), ("precision", self.precision)]
        if self.cross:
            rows.append(("cross", self.cross))
        if self.output_hessian:
            rows.append(("output Hessian", self.output_hessian))
        if self.pad:
            rows.append(("pad", "columns of zeros where no group divides"))
        if self.tensor_scale != "absmax":
            rows.append(("tensor scale", self.tensor_scale))
        if self.activations:
            rows.append(("activations", f"{self.activations}, {scales_name(self.format, *self.activation_scales)}"))
        return rows


def replace_checked(recipe: Recipe, **changes: Any) -> Recipe:
    """``dataclasses.replace``, but an unknown field is refused with the known ones listed."""
    return Recipe.from_dict(recipe.as_dict() | changes)


def as_recipe(recipe: Recipe | str, format: str | None = None) -> Recipe:
    """A Recipe from a Recipe or from a name with ``format``."""
    if isinstance(recipe, Recipe):
        if format is not None and format != recipe.format:
            raise ValueError(f"format is {format!r}, but the recipe is for {recipe.format!r}")
        return recipe
    if not isinstance(recipe, str):
        raise TypeError(f"recipe is {type(recipe).__name__}; it must be a Recipe or a name: {', '.join(NAMES)}")
    return Recipe.named(recipe, format=format or "nvfp4")
