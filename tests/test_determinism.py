"""The same bytes for any number of threads, and for codecs, rotations and products with rounded inputs from every ISA module as well; a level that cannot be had is refused, never replaced."""

import json
import os
import platform
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import mrgptq as mg

LEVELS = ("v2", "v3", "v4", "v4_vnni", "generic")
# Sizes that fill no tile: 3 solver tiles and a rest of rows, 2 column blocks and a rest, panels of tokens and a rest.
SCRIPT = """
import hashlib, json, sys
import numpy as np, mrgptq as mg

threads = json.loads(sys.argv[1])
rng = np.random.default_rng(0)
x = (rng.standard_normal((1100, 288)) * rng.lognormal(0, 1, 288)).astype(np.float32)
w = (rng.standard_t(4, (203, 288)) * 0.02).astype(np.float32)
exact = np.rint(16 * x.astype(np.float64))  # whole numbers, so that NumPy's product is one too, whatever its own threads do
hashes = {}

def note(name, *arrays):
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    hashes[name] = digest.hexdigest()

for format in ("nvfp4", "mxfp4"):
    for scales in ("absmax", "fpquant_mse", "mse") + (("floor", "ceil", "four-thirds", "quest") if format == "mxfp4" else ("four_over_six",)):
        q = mg.quantize(w, format, scales=scales, threads=threads)
        note(f"codec {format} {scales}", q.codes, q.scales, np.float64(q.tensor_scale), q.dequantize(threads=threads))
    note(f"codec activations {format}", mg.round_activations(x, format, threads=threads))
    for activations in ("nvfp4", "mxfp4", "int8"):
        note(f"product {format} {activations}", mg.matmul(x[:77], mg.quantize(w, format), activations=activations, threads=threads))
note("codec alternating", np.float64(mg.alternating_tensor_scale([w, w[:70] * 2], threads=threads)))
for k in (2, 16, 32):
    note(f"rotation {k}", mg.Hadamard(k).apply(x, threads=threads), mg.Hadamard(k).apply_hessian(exact.T @ exact, threads=threads))
note("rotation dense", mg.Dense(w[:24, :24]).apply(x, threads=threads), mg.quantize_activations(x, "nvfp4", rotation=mg.Dense(w[:24, :24]), threads=threads).codes)
h = mg.Hessian(288)
for part in np.array_split(x, 7):
    h.update(part, threads=threads)
note("solver hessian", h.matrix)
for rotation in (None, 32):
    for order in ("natural", "activation"):
        factor = mg.Factor(h, rotation=None if rotation is None else mg.Hadamard(rotation), order=order, threads=threads)
        note(f"solver factor {rotation} {order}", factor.order, factor.hessian)
        single = mg.quantize_layer(w, h, mg.Recipe("nvfp4", rotation=rotation, order=order, precision="float32"), threads=threads)
        note(f"solver factor of float32 {rotation} {order}", single.codes, np.array(single.report.damped_errors))
        for format in ("nvfp4", "mxfp4"):
            for precision in ("float32", "float64"):
                recipe = mg.Recipe(format, rotation=rotation, order=order, precision=precision)
                q = mg.quantize_layer(w, h, recipe, factor=factor, threads=threads)
                note(f"solver {format} {rotation} {order} {precision}", q.codes, q.scales, np.array([q.tensor_scale, q.report.relative_error, q.report.weight_error]))
    for format, group in (("nvfp4", 16), ("mxfp4", 32)):
        factor = mg.Factor(h, rotation=None if rotation is None else mg.Hadamard(rotation), order="group", group_size=group, threads=threads)
        for precision in ("float32", "float64"):
            for scales, rounds in (("gptq", 0), ("gptq", 3), ("hessian", 2), ("hessian_block", 0)):
                recipe = mg.Recipe(format, rotation=rotation, order="group", scales=scales, rounds=rounds, precision=precision)
                q = mg.quantize_layer(w, h, recipe, factor=factor, threads=threads)
                note(f"solver {format} {rotation} {scales} {rounds} {precision}", q.codes, q.scales, np.array([q.tensor_scale, q.report.relative_error, *q.report.damped_errors]))
        cross = np.triu(h.matrix)  # not symmetric
        q = mg.quantize_layer(w, h, mg.Recipe(format, rotation=rotation, order="group", scales="gptq", rounds=2, cross=0.5), factor=factor, cross=cross, threads=threads)
        note(f"solver {format} {rotation} cross", q.codes, q.scales, np.array(q.report.damped_errors))
        part = mg.quantize_layer(w[70:140], h, mg.Recipe(format, rotation=rotation, order="group", scales="gptq", rounds=3), factor=factor, tensor_scale=q.tensor_scale if format == "nvfp4" else None, threads=threads)
        whole = mg.quantize_layer(w, h, mg.Recipe(format, rotation=rotation, order="group", scales="gptq", rounds=3), factor=factor, tensor_scale=q.tensor_scale if format == "nvfp4" else None, threads=threads)
        assert np.array_equal(part.codes, whole.codes[70:140]) and np.array_equal(part.scales, whole.scales[70:140])  # other tiles, the same rows
print(json.dumps({"isa": mg.build_info()["isa"], "threads": mg.build_info()["threads"], "hashes": hashes}))
"""


def run(code, *arguments, isa=None, openmp_threads=None):
    environment = {name: value for name, value in os.environ.items() if name not in ("MRGPTQ_ISA", "OMP_NUM_THREADS")}
    environment |= {name: str(value) for name, value in (("MRGPTQ_ISA", isa), ("OMP_NUM_THREADS", openmp_threads)) if value is not None}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=120)


def outputs(*, threads=None, isa=None, openmp_threads=None):
    done = run(SCRIPT, json.dumps(threads), isa=isa, openmp_threads=openmp_threads)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def one_thread():
    return outputs(openmp_threads=1)


def test_the_script_covers_every_room(one_thread):
    assert len(one_thread["hashes"]) == 11 + 2 + 6 + 1 + 4 + 1 + 8 + 16 + 32 + 4
    assert len(set(one_thread["hashes"].values())) >= 85 - 8 - 16  # different questions have different answers, but the two precisions may agree
    assert one_thread["threads"] == 1


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_same_bytes_for_every_omp_num_threads(one_thread, threads):
    other = outputs(openmp_threads=threads)
    assert other["threads"] == threads  # build_info tells what is used
    assert other["hashes"] == one_thread["hashes"]


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_same_bytes_for_every_threads_argument(one_thread, threads):
    assert outputs(threads=threads, openmp_threads=5)["hashes"] == one_thread["hashes"]


# ---- ISA levels


def built_levels():
    """The levels whose module lies in this installation, looked for as files: independent of how _core.py looks."""
    files = [file.name for folder in mg.__path__ for file in Path(folder).iterdir()]
    return [level for level in LEVELS if any(f"_core_{level}{suffix}" in files for suffix in EXTENSION_SUFFIXES)]


def test_codecs_rotations_and_rounded_products_give_the_same_bytes_on_every_level_built(one_thread):
    """Every level whose module lies on disk and that this machine runs must run. With a single one, a developer's native build, the comparison is with the module in use."""
    built, supported = built_levels(), mg.build_info()["isa_supported"]
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    assert built and (set(built) <= {"v2", "v3", "v4", "v4_vnni"} if x86 else built == ["generic"])
    ran = {}
    for level in [level for level in built if level in supported]:
        result = outputs(isa=level, openmp_threads=2)
        assert result["isa"] == level
        ran[level] = {name: value for name, value in result["hashes"].items() if not name.startswith("solver")}
        assert len(ran[level]) == 11 + 2 + 6 + 1 + 4
    assert set(ran) == set(built) & set(supported)
    assert len(ran) >= 2 or len(built) == 1 or supported == ["v2"]  # nothing was compared: legal only where there is but one to run
    for level, hashes in ran.items():
        assert hashes == {name: one_thread["hashes"][name] for name in hashes}, level


def test_the_highest_level_is_the_default(one_thread):
    usable = [level for level in mg.build_info()["isa_supported"] if level in built_levels()]
    assert one_thread["isa"] == usable[-1]


IMPORT = "import mrgptq; print(mrgptq.build_info()['isa'])"
NOT_BUILT = "import importlib.util as u; real = u.find_spec; u.find_spec = lambda name, *a: None if name.endswith('_core_v2') else real(name, *a); "
OLD_MACHINE = "import sys, types; cpu = types.ModuleType('mrgptq._cpu'); cpu.supported_levels = lambda: ['v2']; sys.modules['mrgptq._cpu'] = cpu; "


@pytest.mark.parametrize(
    ("isa", "before", "words"),
    [
        ("v5", "", 'MRGPTQ_ISA is "v5"; known: v2, v3, v4, v4_vnni, generic'),
        ("", "", 'MRGPTQ_ISA is ""; known: v2, v3, v4, v4_vnni, generic'),
        ("avx2", "", 'MRGPTQ_ISA is "avx2"; known:'),
        ("v4", OLD_MACHINE, 'MRGPTQ_ISA is "v4", which this machine cannot run; it runs v2'),
        ("v2", OLD_MACHINE + NOT_BUILT, 'MRGPTQ_ISA is "v2", which this installation was built without; built: '),
        (None, OLD_MACHINE + NOT_BUILT, "no compiled core for this machine, which runs v2: build mrgptq from source here"),
    ],
)
def test_a_level_that_cannot_be_had_is_refused_in_a_sentence(isa, before, words):
    done = run(before + IMPORT, isa=isa)
    assert done.returncode != 0 and done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ") and words in last


def test_a_level_of_another_processor_is_refused():
    foreign = "generic" if "v2" in mg.build_info()["isa_supported"] else "v2"
    done = run(IMPORT, isa=foreign)
    assert done.returncode != 0
    assert f'MRGPTQ_ISA is "{foreign}", which this machine cannot run; it runs {", ".join(mg.build_info()["isa_supported"])}' in done.stderr
