"""What a measurement was made on and with, as plain values."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mrgptq as mg

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("sse4_2", "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_vbmi", "avx_vnni", "amx_int8", "asimd", "asimddp", "sve", "i8mm")
PACKAGES = ("numpy", "scipy", "torch", "llama-cpp-python", "threadpoolctl")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _cpu_field(name: str) -> str:
    return next((line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith(name)), "")


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ("".join(_lines(str(index / part))) for part in ("level", "type", "size"))
        found[f"L{level}{ {'Data': 'd', 'Instruction': 'i'}.get(kind, '') }"] = size
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _revision() -> str | None:
    """The commit, with a plus where the tree differs from it; None outside a repository."""
    try:
        described = subprocess.run(["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return described.stdout.strip() or None


def _blas() -> list[dict[str, object]]:
    """The BLAS libraries in this process with the kernel they chose and their threads, as threadpoolctl sees them."""
    from threadpoolctl import threadpool_info

    keys = ("internal_api", "version", "architecture", "num_threads", "threading_layer")
    return [{key: pool[key] for key in keys if key in pool} | {"library": Path(pool["filepath"]).name} for pool in threadpool_info() if pool["user_api"] == "blas"]


def describe() -> dict[str, object]:
    """The machine, the core's build, the peers' versions, the revision."""
    flags = set(_cpu_field("flags").split()) | set(_cpu_field("Features").split())
    return {
        "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "caches": _caches(),
        "governor": "".join(_lines("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")) or None,
        "hypervisor": "hypervisor" in flags,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "revision": _revision(),
        "build": mg.build_info(),
        "packages": {package: _version(package) for package in PACKAGES},
        "blas": _blas(),
    }
