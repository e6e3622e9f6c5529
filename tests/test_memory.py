"""What a layer takes beside its inputs, as the kernel counts it, and what a run takes beside what its plan expects: the peak of memory in a fresh process."""

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

PROGRAM = """
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import mrgptq as mg

def resident(field):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))

rows, cols, threads, name, given = *map(int, sys.argv[1:4]), *sys.argv[4:]
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
    elif given == "float32":
        hessian = hessian.astype(np.float32)
    elif given == "by columns":
        hessian = np.asfortranarray(hessian)
    elif given == "strided":
        hessian = hessian[::-1, ::-1]
recipe = replace(mg.Recipe.named(name), cross=0.0, output_hessian=None)
mg.quantize_layer(weight[:64, :256].copy(), np.identity(256), recipe, threads=threads)  # threads, their stacks and what is imported late
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
mg.quantize_layer(weight, hessian, recipe, threads=threads)
print(resident("VmHWM") - before)
"""


def growth(rows, cols, threads, name, given):
    """Bytes at most beside what was there before."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(rows), str(cols), str(threads), name, given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("name", "share"), [("mr-gptq", 6), ("best", 3)])
@pytest.mark.parametrize(
    ("rows", "cols", "given", "threads"),
    # How H was given shows where H is the most of it, what is held for each row and thread where rows are.
    [(512, 2048, given, 2) for given in ("array", "skewed", "float32", "by columns", "strided", "running")] + [(512, 2048, "array", 5), (8192, 1024, "array", 2), (8192, 1024, "array", 5)],
    ids=lambda value: str(value).replace(" ", "-"),
)
def test_a_layer_takes_its_factor_and_a_share_of_its_rows_in_hand(rows, cols, name, share, given, threads):
    """Beside W and H, report included: the factor, 8 bytes a pair of columns, and no second H, however it was given: as a running sum, as an array of any layout and dtype or as one to be made symmetric; nor a
    rotated W, which is turned row by row where it is read. Then the rows in hand, a third of them in float32 and a sixth in float64, but at least eight or four tiles of 32 a thread: errors and gradients (8 bytes
    either way), codes (1), scales and steps (5 a group). Then codes and scales, 9 / 16 of a byte, of the answer and of plain rounding; sums of 128 columns a row; strips below a panel of the factor; and 6 MiB for
    what is packed of it, for pieces of rows and the allocator."""
    factor, in_hand = 8 * cols**2, min(rows + 32, max(rows // share, threads * 32 * 24 // share) + threads * 32) * cols * 10
    most = factor + in_hand + 2 * rows * cols * 9 // 16 + rows * 128 * 8 + threads * 8 * 128 * cols + (6 << 20)
    assert factor < growth(rows, cols, threads, name, given) < most  # less, and the measurement saw nothing


RUN = """
import sys
sys.path.insert(0, sys.argv[4])
from anonymous import Peak
import mrgptq as mg
from mrgptq.jobs import quantize_checkpoint
from mrgptq.plan import make_plan

recipe = mg.Recipe.named("rtn", sys.argv[3])
plan = make_plan(sys.argv[1], sys.argv[2], recipe)
mg.quantize_layer([[1.0] * 64], None, recipe)
peak = Peak()
quantize_checkpoint(plan)
print(plan.memory_bytes, peak.above)
"""


@pytest.mark.parametrize(("format", "layers", "rows", "cols"), [("nvfp4", 2, 4096, 2048), ("mxfp4", 3, 4096, 2048)])
def test_expected_memory_is_a_bound_and_not_twice_too_high(format, layers, rows, cols, tmp_path):
    """Against the anonymous memory of a process that does the run (the mapped model is the page cache's and can be dropped). Sampling may miss the very peak, so it is only bounded from above by the
    plan and by a few MB for what Python itself allocates, and from below by half."""
    (tmp_path / "model").mkdir()
    weight = np.random.default_rng(0).standard_normal((rows, cols)).astype(ml_dtypes.bfloat16)
    safetensors.numpy.save_file({f"m.layers.{i}.up_proj.weight": weight for i in range(layers)}, tmp_path / "model" / "model.safetensors")
    done = subprocess.run([sys.executable, "-c", RUN, str(tmp_path / "model"), str(tmp_path / "out"), format, str(Path(__file__).parents[1] / "bench")], capture_output=True, text=True, check=True)
    expected, measured = map(int, done.stdout.split())
    assert expected > 40e6
    assert 0.5 * expected < measured < expected + 4e6
