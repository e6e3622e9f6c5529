"""What a quantisation gives back: the packed matrix and the report of how it went."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from . import _core
from .arrays import as_output, as_scale, as_threads, choose
from .display import Shown, format_bytes, format_number
from .formats import MX_RULES, SCALE_SEARCHES, block_format
from .rotations import Identity, Rotation


@dataclass(frozen=True, repr=False)
class LayerReport(Shown):
    """How the quantisation of one matrix went; nothing that was done instead of what was asked is missing here.

    Attributes
    ----------
    method : "gptq" or "rounding", as carried out.
    relative_error : tr(E H E^T) / tr(W H W^T) with E = W - Ŵ, an energy; None without a Hessian or where tr(W H W^T) is 0.
    weight_error : the sum of E² over the sum of W²; None for an all-zero W.
    damping, damping_asked : λ / mean(live diagonal of H) as used and as asked; they differ where the factorisation failed at first. None where nothing was factorised.
    dead_columns : columns that no input reached (diagonal of H zero); they were rounded plainly. None without a Hessian.
    fallback : why another method than the one asked was used, None where none was.
    precision : of GPTQ as carried out, and of the products in the errors here, which float32 gives to six digits or more; "float64" where "float32" was asked and could not hold the losses: weight² times the diagonal of H beyond 1e-20 … 1e30 where scales are searched, or a loss that came out as no finite number. None for plain rounding.
    rounded_error : the relative error that plain absmax rounding would have had, to set beside ``relative_error``; None without a Hessian.
    damped_errors : tr(E R E^T) / tr(W R W^T) with R = H + λI, the loss that the solver works on: after the solver, then after each round of refinement. Where a weight was shifted
        to other inputs (``cross``), or rows make up for each other (``output_error``), E is from the shifted one. Empty for plain rounding.
    scale_offsets : {steps: groups}, how far the stored scales lie from what absmax would have stored; eight E4M3 steps are a factor of two, an E8M0 step is one.
    output_error : tr(A E H E^T) / tr(A W H W^T), A being the outputs' second moment; None where none was given, or where it or H is zero. rounded_output_error : the one that plain absmax
        rounding would have had. output_damping : λ / mean(live diagonal of A) as used, 0.05 unless the factorisation failed at first.
    cross : how far the target was moved towards the inputs that the layer will see and, where it writes into the residual stream, to what that has lost; 0 for not at all; see ``cross`` of
        quantize_layer.
    tokens : how many tokens the Hessian saw, None where it came as a plain array.
    rotation : block size of the Hadamard rotation as used, None without one; smaller than the recipe's where that does not divide the columns. padding : columns of zeros that were added so that groups divide them.
    seconds : wall time of the layer, its share of a common factor not included.
    """

    method: str
    format: str
    rows: int
    cols: int
    scales: str
    weight_error: float | None
    relative_error: float | None = None
    damping: float | None = None
    damping_asked: float | None = None
    dead_columns: int | None = None
    fallback: str | None = None
    precision: str | None = None
    rounded_error: float | None = None
    damped_errors: tuple[float, ...] = ()
    scale_offsets: dict[int, int] = field(default_factory=dict)
    output_error: float | None = None
    rounded_output_error: float | None = None
    output_damping: float | None = None
    cross: float = 0.0
    tokens: int | None = None
    rotation: int | None = None
    padding: int = 0
    seconds: float = 0.0

    @property
    def rounds(self) -> int:
        """Rounds of refinement carried out: as many as asked, or fewer where one changed nothing."""
        return max(0, len(self.damped_errors) - 1)

    def as_dict(self) -> dict[str, Any]:
        """Plain values by name as JSON has them: lists for tuples, strings for the offsets."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"damped_errors": list(self.damped_errors), "scale_offsets": {str(steps): count for steps, count in self.scale_offsets.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`as_dict`; ``seconds``, which a checkpoint's record leaves out, are then 0."""
        offsets = {int(steps): count for steps, count in values.get("scale_offsets", {}).items()}
        return cls(**{**values, "damped_errors": tuple(values.get("damped_errors", ())), "scale_offsets": offsets})

    def _title(self) -> str:
        return f"{self.method}, {self.format}, {self.rows} x {self.cols}"

    def _rows(self) -> list[tuple[str, object]]:
        rows: list[tuple[str, object]] = [("scales", self.scales), ("relative error", self.relative_error)]
        if self.rounded_error is not None:
            rows.append(("by plain rounding", self.rounded_error))
        if self.output_error is not None:
            rows += [("by outputs", self.output_error), ("by outputs, rounded", self.rounded_output_error)]
        if self.damped_errors:
            rows.append(("damped, by round", " -> ".join(map(format_number, self.damped_errors))))
        rows.append(("weight error", self.weight_error))
        if self.scale_offsets:
            rows.append(("scales off absmax", format_offsets(self.scale_offsets)))
        if self.damping is not None:
            raised = f" (asked {self.damping_asked:g})" if self.damping != self.damping_asked else ""
            rows.append(("damping", f"{self.damping:g}{raised}"))
        if self.precision is not None:
            rows.append(("precision", self.precision))
        if self.output_damping is not None:
            rows.append(("output damping", self.output_damping))
        if self.cross:
            rows.append(("cross", self.cross))
        if self.padding:
            rows.append(("columns of zeros added", self.padding))
        rows += [("dead columns", self.dead_columns), ("fallback", self.fallback or "none")]
        if self.tokens is not None:
            rows.append(("tokens", self.tokens))
        return rows + [("seconds", self.seconds)]


def format_offsets(offsets: Mapping[Any, int]) -> str:
    """A report's ``scale_offsets`` in a line, each offset with its share of the groups: "-1: 12 %  0: 80 %  +1: 8 %". Shares below half a percent are left out."""
    total = sum(offsets.values())
    shares = [(int(steps), 100 * count / total) for steps, count in sorted(offsets.items(), key=lambda item: int(item[0]))]
    return "  ".join(f"{steps:+d}: {share:.0f} %" if steps else f"0: {share:.0f} %" for steps, share in shares if share >= 0.5)


@dataclass(frozen=True)
class Activations:
    """How a layer's inputs are rounded before the product (W4A4), in groups along the columns.

    Attributes
    ----------
    format : "mxfp4" or "nvfp4".
    mx_rule : how MXFP4 rounds a scale to a power of two.
    rule : how a group's scale is found, as in ``round_activations``: "absmax" is what stock kernels do, "mse" loses less.
    tensor_scale : the NVFP4 divisor 2688 / amax(X), calibrated; None where it is not known yet, and for MXFP4, which has none.
    """

    format: str
    mx_rule: str = "even"
    tensor_scale: float | None = None
    rule: str = "absmax"

    def __post_init__(self) -> None:
        block_format(self.format)
        choose("mx_rule", self.mx_rule, MX_RULES)
        choose(f"rule for {self.format}", self.rule, SCALE_SEARCHES[self.format])
        if self.rule == "quest" and self.mx_rule == "four-thirds":
            raise ValueError('rule is "quest", which makes powers of two; mx_rule is "four-thirds": take another')
        if self.tensor_scale is not None:
            object.__setattr__(self, "tensor_scale", as_scale(self.tensor_scale, "tensor_scale"))


@dataclass(frozen=True, repr=False, eq=False)
class QuantizedMatrix(Shown):
    """A matrix in a 4-bit block format, in the layout that checkpoints store.

    The value of a code is ``step * e2m1(code)`` with ``step = scale / tensor_scale`` in float32.

    Attributes
    ----------
    format : "mxfp4" or "nvfp4".
    codes : (rows, cols / 2) uint8, the even column in the low nibble.
    scales : (rows, cols / group_size) uint8, E8M0 (MXFP4) or E4M3 (NVFP4) bits; ``scales.view(ml_dtypes.float8_e4m3fn)`` reads them without a copy.
    tensor_scale : the divisor: 2688 / amax for NVFP4, 3 for MXFP4 by four-thirds, else 1.
    rotation : Identity() or Hadamard(k): the basis the codes are in.
    activations : Activations for W4A4, None for W4A16.
    recipe : the Recipe it was made by, None from plain ``quantize``.
    report : LayerReport, None for a matrix that was read from disk.
    clip_mask : (rows, cols) bool from the rule "quest": True where a value was not clipped; None from other rules.
    padding : how many columns of zeros were added behind the matrix's own, so that groups divide them. ``shape`` leaves them out; codes, scales and clip_mask have them.
    """

    format: str
    codes: NDArray[np.uint8]
    scales: NDArray[np.uint8]
    tensor_scale: float
    rotation: Rotation = field(default_factory=Identity)
    activations: Activations | None = None
    recipe: Any = None
    report: LayerReport | None = None
    clip_mask: NDArray[np.bool_] | None = None
    padding: int = 0

    def __post_init__(self) -> None:
        group = block_format(self.format).group_size
        for name in ("codes", "scales"):
            array = getattr(self, name)
            if array.dtype != np.uint8 or array.ndim != 2:
                raise ValueError(f"{name} is {array.dtype} of shape {array.shape}; it must be a uint8 matrix")
        if self.scales.shape != (self.codes.shape[0], self.codes.shape[1] * 2 // group) or self.codes.shape[1] * 2 % group:
            raise ValueError(f"codes {self.codes.shape} and scales {self.scales.shape} do not fit: {self.format} has one scale for {group} columns, two columns a byte of codes")
        if not 0 <= self.padding < min(group, 2 * self.codes.shape[1]):
            raise ValueError(f"padding is {self.padding}; of {2 * self.codes.shape[1]} columns in groups of {group} fewer than a group can be added")
        self.rotation.check_columns(self.codes.shape[1] * 2, "the matrix")

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the matrix."""
        return (self.codes.shape[0], self.codes.shape[1] * 2 - self.padding)

    @property
    def nbytes(self) -> int:
        """Bytes on disk: codes, scales and the tensor scale."""
        return self.codes.nbytes + self.scales.nbytes + (4 if self.tensor_scale != 1 else 0)

    def dequantize(self, out: NDArray[np.float32] | None = None, *, unrotate: bool = False, threads: int | None = None) -> NDArray[np.float32]:
        """The values as (rows, cols) float32, in the rotated basis, or with ``unrotate=True`` in the original one. ``out``: an array to write them into; new memory costs more than the values.

        In the rotated basis a block spreads over the columns that were added, so there the values are (rows, cols + padding).
        """
        rows, whole = self.codes.shape[0], self.codes.shape[1] * 2
        cut = self.padding > 0 and (unrotate or self.rotation == Identity())
        answer = np.empty(self.shape if cut else (rows, whole), dtype=np.float32) if out is None else as_output(out, self.shape if cut else (rows, whole))
        values = np.empty((rows, whole), dtype=np.float32) if cut else answer
        _core.dequantize_into(*self.core_arrays(), values, as_threads(threads))
        if unrotate and self.rotation != Identity():
            self.rotation.apply_inverse(values, out=values, threads=threads)
        if cut:
            answer[...] = values[:, : self.shape[1]]
        return answer

    def core_arrays(self) -> tuple[str, NDArray[np.uint8], NDArray[np.uint8], float]:
        """What the core takes: format, codes, scales and tensor scale."""
        return self.format, np.ascontiguousarray(self.codes), np.ascontiguousarray(self.scales), self.tensor_scale

    def _title(self) -> str:
        return f"QuantizedMatrix {self.format}, {self.shape[0]} x {self.shape[1]}"

    def _rows(self) -> list[tuple[str, object]]:
        rows: list[tuple[str, object]] = [("size", f"{format_bytes(self.nbytes)}, {8 * self.nbytes / (self.shape[0] * self.shape[1]):.3f} bits a weight"), ("tensor scale", self.tensor_scale), ("rotation", repr(self.rotation))]
        if self.activations is not None:
            rows.append(("activations", f"{self.activations.format}, {self.activations.rule}, tensor scale {format_number(self.activations.tensor_scale)}"))
        return rows + (self.report._rows() if self.report else [])


def layer_report(matrix: QuantizedMatrix) -> LayerReport:
    """The report of a matrix that was just quantised; ValueError for one read from disk, which has none."""
    if matrix.report is None:
        raise ValueError("the matrix was read from disk and has no report")
    return matrix.report
