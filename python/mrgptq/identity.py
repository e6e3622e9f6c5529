"""What the bytes of a run depend on, for a person to read: written down when it begins, compared when it goes on."""

import hashlib
import os
from collections.abc import Iterable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import _core
from .arrays import as_threads
from .checkpoint.hessians import StoredHessians
from .checkpoint.reader import CheckpointReader
from .plan import CalibrationPlan, Plan

SUMMING = (
    "CUBLAS_WORKSPACE_CONFIG", "DNNL_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA", "KMP_DETERMINISTIC_REDUCTION", "MKL_CBWR", "MKL_DOMAIN_NUM_THREADS", "MKL_DYNAMIC", "MKL_ENABLE_INSTRUCTIONS", "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA", "OPENBLAS_CORETYPE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)  # fmt: skip
"""Environment variables that choose the kernels, and so the order of the sums, of what torch multiplies with. ATEN_CPU_CAPABILITY is seen in what torch makes of it."""


def identity_of(plan: Plan | CalibrationPlan, reader: CheckpointReader, calibration: str | None, device: str, threads: int | None, cpu_capability: str | None) -> dict[str, Any]:
    """All that the bytes of a run depend on, JSON values by what they are of. ``cpu_capability``: torch's, None for a run without a text. Files are told by their size and the time they were changed: to read them all could take as long as the run."""
    isa = _core.build_info()["isa"]
    identity: dict[str, Any] = {
        "command": "mrgptq quantize" if isinstance(plan, Plan) else "mrgptq calibrate",
        "mrgptq version": version("mrgptq"),
        "layer": {name: list(shape) for name, shape in plan.shapes.items()},
        "model file": _files(reader.files()),
    }
    if isinstance(plan, Plan):
        identity |= {"recipe": plan.recipe.as_dict(), "dialect": plan.dialect, "max_shard_bytes": plan.max_shard_bytes}
        if plan.hessians:
            stored = StoredHessians(plan.hessians)
            identity |= {"Hessian file": _files({stored.index, *(stored.file(name) for name in stored)}), "ISA level": isa}
    if plan.tokens:
        # torch's sums, and so everything after them, depend on its threads.
        libraries = {name: version(name) for name in ("torch", "transformers", "tokenizers") if find_spec(name)}
        identity["model file"] |= _files(path for path in reader.folder.glob("*tok*") if path.is_file())  # wherever a link leads
        identity |= {"CPU capability of torch": cpu_capability, "environment variable": {name: os.environ[name] for name in SUMMING if name in os.environ}}
        text = hashlib.sha256((calibration or "").encode()).hexdigest()
        identity |= {"tokens": plan.tokens, "sequence": plan.sequence, "SHA-256 of the calibration text": text, "library version": libraries, "threads": as_threads(threads), "device": device, "ISA level": isa}
    return identity


def _files(paths: Iterable[Path]) -> dict[str, str]:
    return {path.name: f"of {status.st_size} bytes, changed at {status.st_mtime_ns} ns" for path in sorted(paths) for status in [path.stat()]}
