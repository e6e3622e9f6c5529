"""A quantisation method as a value: it prints, compares, becomes JSON and travels into the checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from .arrays import choose
from .codecs import resolve_scales, scales_name
from .display import Shown
from .formats import block_format
from .gptq import ORDERS, as_damping
from .rotations import rotation_of

SOLVERS = ("rtn", "gptq")
PRECISIONS = ("float32", "float64")
NAMES = ("rtn", "gptq", "mr-gptq")
DIALECTS = ("compressed-tensors", "fp_quant")


@dataclass(frozen=True, repr=False)
class Recipe(Shown):
    """How a layer is quantised; ``dataclasses.replace(recipe, field=value)`` makes a changed one.

    Attributes
    ----------
    format : "nvfp4" or "mxfp4".
    rotation : block size of the Hadamard rotation, a power of two from 2 on; None for none.
    scales : "absmax" or "fpquant_mse", for MXFP4 also a rule's name; see ``quantize``.
    mx_rule : how MXFP4 rounds scales to powers of two. compressed-tensors and vLLM assume "even" for activations; only fp_quant stores "four-thirds".
    order : "activation" or "natural", see ``Factor``. solver : "gptq", or "rtn" for plain rounding.
    damping : λ / mean(diag H), >= 0.
    rounds : refinement rounds after the solver; 0, as long as the only solvers are these two.
    activations : None for W4A16; the format's own name for W4A4.
    activation_rule : "absmax": the activation scale of a group comes from its largest magnitude (for MXFP4 by ``mx_rule``).
    precision : of GPTQ's errors and feedback; the factor is float64 in both. "float64": equal to ``mrgptq.reference`` code for code. "float32": faster; a row may part from
        the reference where a value lies within float32 rounding of a tie, which moved relative errors by up to 2e-6 in our tests.

    Raises
    ------
    ValueError : names the field, what was given and what is allowed.
    """

    format: str = "nvfp4"
    rotation: int | None = None
    scales: str | None = "fpquant_mse"
    mx_rule: str = "even"
    order: str = "activation"
    solver: str = "gptq"
    damping: float = 0.01
    rounds: int = 0
    activations: str | None = None
    activation_rule: str = "absmax"
    precision: str = "float64"

    def __post_init__(self) -> None:
        block_format(self.format)
        object.__setattr__(self, "rotation", rotation_of(self.rotation).block_size)  # a plain int, so that a NumPy one becomes JSON too
        resolve_scales(self.format, self.scales, self.mx_rule)
        choose("order", self.order, ORDERS)
        choose("solver", self.solver, SOLVERS)
        object.__setattr__(self, "damping", as_damping(self.damping))
        choose("rounds", self.rounds, (0,))
        choose(f"activations for {self.format}", self.activations, (None, self.format))
        choose("activation_rule", self.activation_rule, ("absmax",))
        choose("precision", self.precision, PRECISIONS)

    @classmethod
    def named(cls, name: str, format: str = "nvfp4", dialect: str = "compressed-tensors", activations: str | None = None) -> "Recipe":
        """A recipe by name, with what the dialect asks for.

        Parameters
        ----------
        name : "rtn": absmax scales and plain rounding. "gptq": absmax scales, activation order. "mr-gptq": the paper as its authors ship it: Hadamard 16 (NVFP4) or
            32 (MXFP4), fpquant_mse scales, activation order.
        dialect : "fp_quant" stores MXFP4 by four-thirds, "compressed-tensors" by even.
        """
        choose("recipe", name, NAMES)
        choose("dialect", dialect, DIALECTS)
        mx_rule = "four-thirds" if dialect == "fp_quant" and format == "mxfp4" else "even"
        base = cls(format=format, scales="absmax", mx_rule=mx_rule, activations=activations)
        if name == "rtn":
            return replace_checked(base, solver="rtn", order="natural")
        if name == "gptq":
            return base
        return replace_checked(base, rotation=block_format(format).group_size, scales="fpquant_mse")

    @property
    def resolved_mx_rule(self) -> str:
        """The MX rule that rounds the weights' scales, "even" where the format has none."""
        return resolve_scales(self.format, self.scales, self.mx_rule)[1]

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
        rows: list[tuple[str, object]] = [("rotation", "none" if self.rotation is None else f"Hadamard {self.rotation}"), ("scales", scales_name(self.format, *resolve_scales(self.format, self.scales, self.mx_rule))), ("solver", self.solver)]
        if self.solver == "gptq":
            rows += [("order", self.order), ("damping", self.damping), ("precision", self.precision)]
        if self.activations:
            rows.append(("activations", f"{self.activations}, {scales_name(self.format, self.activation_rule, self.mx_rule)}"))
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
