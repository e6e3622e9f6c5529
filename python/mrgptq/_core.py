"""The compiled core: chooses, once, the extension module for the highest instruction-set level that this machine runs.

``MRGPTQ_ISA=v2|v3|v4|v4_vnni`` forces a level; one that is unknown, not built or not supported here is refused, never replaced by another.
"""

import importlib
import importlib.util
import os
from types import ModuleType

from . import _cpu


def _built(level: str) -> bool:
    return importlib.util.find_spec(f"{__package__}._core_{level}") is not None


def _load() -> ModuleType:
    known = ("v2", "v3", "v4", "v4_vnni", "generic")
    supported = _cpu.supported_levels()
    asked = os.environ.get("MRGPTQ_ISA")
    if asked is None:
        usable = [level for level in supported if _built(level)]
        if not usable:
            raise ImportError(f"no compiled core for this machine, which runs {', '.join(supported) or 'none of the levels'}: build mrgptq from source here")
        asked = usable[-1]
    elif asked not in known:
        raise ImportError(f'MRGPTQ_ISA is "{asked}"; known: {", ".join(known)}')
    elif asked not in supported:
        raise ImportError(f'MRGPTQ_ISA is "{asked}", which this machine cannot run; it runs {", ".join(supported)}')
    elif not _built(asked):
        raise ImportError(f'MRGPTQ_ISA is "{asked}", which this installation was built without; built: {", ".join(level for level in known if _built(level))}')
    return importlib.import_module(f"{__package__}._core_{asked}")


_module = _load()
globals().update({name: value for name, value in vars(_module).items() if not name.startswith("_")})


def supported_levels() -> list[str]:
    """The levels this machine runs, lowest first."""
    return list(_cpu.supported_levels())
