"""What a layer takes beside its inputs, as the kernel counts it: the peak of resident memory in a fresh process."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import mrgptq as mg

def resident(field):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))

rows, cols, name, given = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
rng = np.random.default_rng(0)
weight = rng.standard_normal((rows, cols), dtype=np.float32)
if given == "running":
    hessian = mg.Hessian(cols)
    hessian.update(rng.standard_normal((2 * cols, cols), dtype=np.float32), threads=2)
else:
    hessian = np.identity(cols)
    hessian += 0.01
    if given == "skewed":
        hessian[0, 1] += 1e-9
recipe = replace(mg.Recipe.named(name), cross=0.0, output_hessian=None)
mg.quantize_layer(weight[:64, :256].copy(), np.identity(256), recipe, threads=2)  # threads, their stacks and what is imported late
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
mg.quantize_layer(weight, hessian, recipe, threads=2)
print(resident("VmHWM") - before)
"""


def growth(rows, cols, name, given):
    """Bytes at most beside what was there before."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(rows), str(cols), name, given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("given", ["array", "skewed", "running"])
@pytest.mark.parametrize(("name", "share"), [("mr-gptq", 6), ("best", 3)])
@pytest.mark.parametrize(("rows", "cols"), [(512, 2048), (8192, 1024)])
def test_a_layer_takes_its_factor_and_a_share_of_its_rows_in_hand(rows, cols, name, share, given):
    """Beside W and H, report included: the factor, 8 bytes a pair of columns, and no second H, whether it was given as a running sum, as an array or as one to be made symmetric; nor a rotated W,
    which is turned row by row where it is read. Then the rows in hand, a third of them in float32 and a sixth in float64, but at least eight or four tiles of 32 a thread: errors and gradients (8 bytes either way), codes
    (1), scales and steps (5 a group). Then codes and scales, 9 / 16 of a byte, of the answer and of plain rounding; sums of 128 columns a row; strips below a panel of the factor; and 6 MiB for what
    is packed of it, for pieces of rows and the allocator."""
    factor, in_hand = 8 * cols**2, (max(rows // share, 2 * 32 * 24 // share) + 2 * 32) * cols * 10
    most = factor + in_hand + 2 * rows * cols * 9 // 16 + rows * 128 * 8 + 2 * 8 * 128 * cols + (6 << 20)
    assert factor < growth(rows, cols, name, given) < most  # less, and the measurement saw nothing
