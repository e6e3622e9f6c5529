"""What a solve takes beside its inputs, as the kernel counts it: the peak of resident memory in a fresh process."""

import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import mrgptq as mg

PROGRAM = """
import sys
from pathlib import Path

import numpy as np
import mrgptq as mg
from mrgptq import _core

def resident(field):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))

rows, cols, name, given = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
rng = np.random.default_rng(0)
weight = rng.standard_normal((rows, cols), dtype=np.float32)
if given == "taken":
    hessian = mg.Hessian(cols)
    hessian.update(rng.standard_normal((2 * cols, cols), dtype=np.float32), threads=2)
else:
    hessian = np.identity(cols)
    hessian += 0.01
scales = mg.quantize(weight, "nvfp4")
mg.quantize_layer(weight[:64, :256].copy(), np.identity(256), name, threads=2)  # threads, their stacks and what is imported late
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
factor = mg.make_factor(hessian, name, copy=given == "copied", threads=2)
recipe = mg.Recipe.named(name)
_core.solve("nvfp4", weight, scales.scales.copy(), scales.tensor_scale, factor.core, None, recipe.precision, recipe.scales == "gptq", "even", recipe.rounds, 2)
print(resident("VmHWM") - before)
"""


def growth(rows, cols, name, given):
    """Bytes at most beside what was there before the factor was made."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(rows), str(cols), name, given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("name", "given", "copies"), [("mr-gptq", "copied", 1), ("best", "copied", 1), ("mr-gptq", "kept", 1), ("best", "kept", 0), ("mr-gptq", "taken", 0), ("best", "taken", 0)])
@pytest.mark.parametrize(("rows", "cols"), [(512, 2048), (8192, 1024)])
def test_a_solve_takes_its_factor_a_band_of_rows_a_thread_and_a_copy_of_h_only_where_it_is_rotated_or_asked_for(rows, cols, name, given, copies):
    """Beside W and H: the factor and, to be rotated or kept from later changes, H once more, 8 bytes an element each (a running Hessian gives its own memory); of the rows that two threads
    have in hand, 32 tiles of 32 each, the errors and, to be refined, their gradients (8 bytes together: float64 errors alone or both in float32) and codes (1); the packed answer and its scales;
    sums of 128 columns a row; 6 MiB for what is packed of the factor, its strips below a panel and the allocator."""
    moments, in_hand = (1 + copies) * 8 * cols**2, min(rows, 2 * 32 * 32) * cols * 9
    below = 2 * 8 * 128 * cols
    most = moments + in_hand + rows * cols * 9 // 16 + rows * 128 * 8 + below + (6 << 20)
    least = moments  # or the measurement saw nothing
    assert least < growth(rows, cols, name, given) < most


@pytest.mark.parametrize(("name", "least", "most"), [("best", 0, 0.4), ("mr-gptq", 1, 1.4)])
def test_a_layer_copies_h_only_to_rotate_it(name, least, most):
    """NumPy's arrays, which tracemalloc counts, beside a weight of 16 rows: the factor, by the core's own hand, is not among them."""
    rng = np.random.default_rng(0)
    weight, hessian = rng.standard_normal((16, 1024), dtype=np.float32), np.identity(1024) + 0.01
    recipe = replace(mg.Recipe.named(name), cross=0.0, output_hessian=None)
    mg.quantize_layer(weight, hessian, recipe)
    tracemalloc.start()
    mg.quantize_layer(weight, hessian, recipe)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert least * hessian.nbytes <= peak < most * hessian.nbytes
