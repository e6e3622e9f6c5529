"""What a measurement was made on and with, as plain values."""

import ctypes
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
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


def _fingerprint(files: Iterable[Path], folder: Path) -> str:
    """The first digits of a SHA-256 over the files' names below ``folder`` and what is in them: wherever the folder lies, the same."""
    digest = hashlib.sha256()
    for path in sorted(files):
        for part in (path.relative_to(folder).as_posix().encode(), path.read_bytes()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:12]


def installed() -> dict[str, object]:
    """Fingerprints of what was imported: the extension, the package's Python files, and whether these are the checkout's."""
    package, checkout = Path(mg.__file__).parent, ROOT / "python" / "mrgptq"
    extension = Path(str(sys.modules[f"mrgptq._core_{mg.build_info()['isa']}"].__file__))
    python, own = (_fingerprint(folder.rglob("*.py"), folder) for folder in (package, checkout))
    return {"extension": _fingerprint([extension], extension.parent), "python": python, "as_checkout": python == own}


def ggml_of(folder: Path) -> dict[str, str | None]:
    """Version and commit, where the library tells them, and a fingerprint of the libraries in a folder."""
    library = ctypes.CDLL(str(folder / "libggml-base.so"))
    told: dict[str, str | None] = {}
    for name in ("version", "commit"):
        function = getattr(library, f"ggml_{name}", None)
        if function is not None:
            function.restype = ctypes.c_char_p
        told[name] = function().decode() if function is not None else None
    return told | {"fingerprint": _fingerprint(folder.glob("libggml-*.so"), folder)}


def _blas() -> list[dict[str, object]]:
    """The BLAS libraries in this process with the kernel they chose and their threads, as threadpoolctl sees them."""
    from threadpoolctl import threadpool_info

    keys = ("internal_api", "version", "architecture", "num_threads", "threading_layer")
    return [{key: pool[key] for key in keys if key in pool} | {"library": Path(pool["filepath"]).name} for pool in threadpool_info() if pool["user_api"] == "blas"]


def describe(ggml: Path | None = None) -> dict[str, object]:
    """The machine, the core's build, what was imported of it, the peers' versions, the checkout's revision; ``ggml``: the folder of its libraries."""
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
        "installed": installed(),
        "packages": {package: _version(package) for package in PACKAGES},
        "ggml": ggml_of(ggml) if ggml else None,
        "blas": _blas(),
    }
