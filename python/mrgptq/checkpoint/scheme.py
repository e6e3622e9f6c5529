"""What the quantised layers of one checkpoint have in common, as its configuration has to say it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from ..arrays import choose
from ..formats import block_format
from ..recipe import Recipe
from ..result import QuantizedMatrix
from ..rotations import Dense


@dataclass(frozen=True)
class Scheme:
    """Format, rotation block size (None: none) and activation format (None: W4A16) of a checkpoint's layers, the MX rules of both and how activation scales are found. Layers whose columns the rotation does not divide have
    a smaller one."""

    format: str
    rotation: int | None
    activations: str | None
    mx_rule: str
    activation_mx_rule: str
    activation_rule: str = "absmax"

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> Self:
        """What the layers made by a Recipe will be."""
        search, mx_rule = recipe.activation_scales if recipe.activations else ("absmax", "even")
        four_thirds = recipe.format == "mxfp4" and recipe.resolved_mx_rule == "four-thirds"
        return cls(recipe.format, recipe.rotation, recipe.activations, "four-thirds" if four_thirds else "even", mx_rule, search)

    @classmethod
    def of_matrix(cls, matrix: QuantizedMatrix) -> Self:
        """What a QuantizedMatrix is. The rule its weights were scaled by shows only in the divisor: any power of two may come from any rule."""
        if isinstance(matrix.rotation, Dense):
            raise ValueError(f"the matrix is turned by {matrix.rotation}; checkpoints know Hadamard rotations alone")
        activations = matrix.activations
        four_thirds = matrix.format == "mxfp4" and matrix.tensor_scale == 3
        return cls(
            matrix.format,
            matrix.recipe.rotation if matrix.recipe is not None else matrix.rotation.block_size,
            activations.format if activations else None,
            "four-thirds" if four_thirds else "even",
            activations.mx_rule if activations else "even",
            activations.rule if activations else "absmax",
        )

    @property
    def label(self) -> str:
        """As people call it: "NVFP4 W4A4, Hadamard 16"."""
        parts = [f"{self.format.upper()} W4A{4 if self.activations else 16}"]
        if self.rotation:
            parts.append(f"Hadamard {self.rotation}")
        if self.mx_rule != "even":
            parts.append(self.mx_rule)
        if self.activation_rule != "absmax":
            parts.append(f"activations by {self.activation_rule}")
        elif self.activations == "mxfp4" and self.activation_mx_rule != self.mx_rule:
            parts.append(f"activations by {self.activation_mx_rule}")
        return ", ".join(parts)

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return block_format(self.format).group_size


def common_scheme(matrices: Mapping[str, QuantizedMatrix]) -> Scheme:
    """The Scheme that all of a mapping's QuantizedMatrix share, the largest of their rotations in it; ValueError names the first that differs. Padded ones may be without a rotation where others have one."""
    rotations = [Scheme.of_matrix(matrix).rotation for matrix in matrices.values()]
    rotation = max(filter(None, rotations), default=None)
    first_name, scheme = None, None
    for (name, matrix), size in zip(matrices.items(), rotations, strict=True):
        own = replace(Scheme.of_matrix(matrix), rotation=rotation if size or matrix.padding else None)
        if scheme is None:
            first_name, scheme = name, own
        elif own != scheme:
            raise ValueError(f"{name} is {Scheme.of_matrix(matrix).label}, but {first_name} is {Scheme.of_matrix(matrices[first_name or name]).label}; one checkpoint holds layers of one kind")
    if scheme is None:
        raise ValueError("there is no QuantizedMatrix among the tensors; nothing to say in the configuration")
    choose("format", scheme.format, ("nvfp4", "mxfp4"))
    return scheme
