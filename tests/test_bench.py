"""The benchmarks themselves: an answer that is wrong is never timed, and tables say what was measured."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mrgptq
from mrgptq import _core

BENCH = Path(__file__).parent.parent / "bench"


def key_of(name, arguments):
    """What tells one timed call of the core from another: its function, names and whole numbers, whether it works in place, the form of a packed matrix, and of a product how many tokens it has."""
    product = name.startswith("matmul")

    def described(i, argument):
        if isinstance(argument, np.ndarray):
            return any(argument is other for other in arguments[:i]), len(argument) if product and i == 0 else None
        if isinstance(argument, tuple):
            return argument[0], len(argument), len(argument[1]) if product and i == 0 else None
        return argument if isinstance(argument, str | int) else None

    return repr((name, [described(i, argument) for i, argument in enumerate(arguments)]))


def with_code(codes):
    codes[-1, -1] ^= 1


def with_value(values):
    values[-1, -1] += 0.001 * np.abs(values).max()


def with_diagonal(matrix):
    matrix[0, 0] *= 2


# How a call goes wrong, from its arguments and its answer: another answer, or None where what it has written is another.
FAULTS = {
    "amax": lambda arguments, answer: 1.001 * answer,
    "nvfp4_tensor_scale": lambda arguments, answer: 1.001 * answer,
    "quantize": lambda arguments, answer: with_code(answer[0]),
    "find_scales": lambda arguments, answer: with_code(answer),
    "round_to_grid": lambda arguments, answer: with_value(arguments[7]),
    "dequantize_into": lambda arguments, answer: with_value(arguments[4]),
    "rotate_columns": lambda arguments, answer: with_value(arguments[2]),
    "matmul": lambda arguments, answer: with_value(arguments[2]),
    "matmul_packed": lambda arguments, answer: with_value(arguments[2]),
    "matmul_int8": lambda arguments, answer: with_value(arguments[2]),
    "make_symmetric": lambda arguments, answer: with_diagonal(arguments[1]),
    "CholeskyFactor": lambda arguments, answer: with_diagonal(arguments[0]),  # before the matrix is factorised
    "HessianSum.update": lambda arguments, answer: HESSIAN_SUM.update(arguments[0], arguments[1][:1], 1),  # a token twice
    "solve": lambda arguments, answer: with_code(answer[0]),
    "quadratic_forms": lambda arguments, answer: [*answer[:-1], 1.001 * answer[-1]],
    "square_sums": lambda arguments, answer: (1.001 * answer[0], answer[1]),
    "diagonal_form": lambda arguments, answer: 1.001 * answer,
}
HESSIAN_SUM = _core.HessianSum


def watch(monkeypatch, seen):
    """After each call of the core ``seen(name, arguments, answer)`` may say another answer."""
    for name, function in list(vars(_core).items()):
        if name in FAULTS and not isinstance(function, type):

            def watched(*arguments, name=name, function=function):
                answer = function(*arguments)
                other = seen(name, arguments, answer)
                return answer if other is None else other

            monkeypatch.setattr(_core, name, watched)

    class HessianSum(_core.HessianSum):
        def update(self, x, threads):
            super().update(x, threads)
            seen("HessianSum.update", (self, x, threads), None)

    class CholeskyFactor(_core.CholeskyFactor):
        def __init__(self, *arguments):
            seen("CholeskyFactor", arguments, None)
            super().__init__(*arguments)

    monkeypatch.setattr(_core, "HessianSum", HessianSum)
    monkeypatch.setattr(_core, "CholeskyFactor", CholeskyFactor)


@pytest.mark.parametrize("room", ["codecs", "gptq", "matmul", "rotations"])
def test_a_fault_in_anything_that_is_timed_ends_the_run_before(room, monkeypatch):
    """Every call of the core that the stopwatch would see goes wrong once, that call alone, however the same function is called elsewhere."""
    monkeypatch.syspath_prepend(str(BENCH))
    bench, timing = (importlib.import_module(name) for name in (f"bench_{room}", "timing"))
    timed, timing_now = {}, False

    def once_each(contenders, **_):
        nonlocal timing_now
        timing_now = True
        for call in contenders.values():
            call()
        timing_now = False
        return dict.fromkeys(contenders, timing.Timing((1.0,)))

    def note(name, arguments, _):
        if timing_now:
            timed[key_of(name, arguments)] = name

    with monkeypatch.context() as patch:
        patch.setattr(bench, "interleaved", once_each)
        watch(patch, note)
        bench.measure(1, True, False)
    assert len(timed) >= 8

    def too_late(contenders, **_):
        raise AssertionError("timed, though the answer is wrong")

    monkeypatch.setattr(bench, "interleaved", too_late)
    for key, spoiled in timed.items():
        with monkeypatch.context() as patch:
            watch(patch, lambda name, arguments, answer, key=key, spoiled=spoiled: FAULTS[name](arguments, answer) if name == spoiled and key_of(name, arguments) == key else None)
            with pytest.raises(SystemExit) as ended:
                bench.measure(1, True, False)
        assert len(str(ended.value).split()) > 5, key  # a sentence


def test_nothing_that_is_timed_escapes_the_faults():
    """What the benchmarks of the core name is in FAULTS, or is not timed."""
    named = {name for path in BENCH.glob("bench_*.py") for name in re.findall(r"_core\.(\w+)", path.read_text())}
    assert named - FAULTS.keys() == {"SecondMoment", "dequantize"}  # both only compare answers


@pytest.mark.parametrize(("amount", "medians", "ratios"), [(None, (2.0, 6.0), {"peer": 3.0, "bound": 0.5}), ({"ours": 4.0, "peer": 3.0}, (2.0, 0.5), {"peer": 4.0, "bound": 2.0})])
def test_a_ratio_says_how_many_times_as_fast(amount, medians, ratios, monkeypatch):
    """2 s against 6 s, then rates: 4 units in 2 s against 3 in 6 s; the bound is 1 s, then 1 unit a second."""
    monkeypatch.syspath_prepend(str(BENCH))
    timing = importlib.import_module("timing")
    timings = {"ours": timing.Timing((2.0, 2.0, 3.0)), "peer": timing.Timing((6.0,))}
    ours, peer = timing.records("room", "work", "shape", "unit", 1, timings, amount=amount, against={"ours": ("peer", "absent")}, bound=("bound", 1.0))
    assert (ours["median"], peer["median"]) == medians and ours["ratios"] == ratios and set(peer["ratios"]) == {"bound"}


RESULT = {"room": "gptq", "work": "solve", "contender": "mrgptq", "shape": "4 × 4", "unit": "s", "median": 0.25, "low": 0.2, "high": 0.3, "threads": 1, "ratios": {"peer": 2.0, "bound": 0.5}}
MACHINE = {"caches": {"L2": "1024K"}, "blas": [], "packages": {"numpy": "2", "torch": None}, "cores": 2, "cpu": "A", "hypervisor": True, "flags": ["fma"], "governor": None, "revision": "abc", "python": "3",
           "build": {"version": "1", "isa": "v3", "compiler": "GNU"}}  # fmt: skip


def test_tables_are_written_from_results(tmp_path):
    peer = RESULT | {"contender": "peer", "median": None, "note": "peer is not installed"}
    result = {"command": "python bench/run.py", "machine": MACHINE, "quick": False, "rows": [RESULT, RESULT | {"threads": 2, "median": 0.125}, {key: value for key, value in peer.items() if key != "ratios"}]}
    (tmp_path / "a.json").write_text(json.dumps(result))
    page = tmp_path / "README.md"
    marks = re.findall(r"^<!-- .*results.* -->$", (BENCH / "README.md").read_text(), re.MULTILINE)
    page.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nafter\n")
    command = [sys.executable, str(BENCH / "tables.py"), str(tmp_path / "a.json"), "--readme", str(page)]
    subprocess.run(command, check=True)
    written = page.read_text()
    assert written.startswith("before\n") and written.endswith("\nafter\n") and "old" not in written
    assert "| solve | 4 × 4 | mrgptq | s | 0.25 (0.2–0.3) | 2.00 peer, 0.50 bound | 0.125 (0.2–0.3) | 2.00 peer, 0.50 bound |" in written
    assert "| peer | s | – | peer is not installed | – |  |" in written and "revision abc" in written and "torch not installed" in written
    subprocess.run(command, check=True)
    assert page.read_text() == written  # written again, it is the same page
    # Another file has the room for 2 threads and a room of its own: rows of 1 thread stay, and each file's command is said.
    later = result | {"command": "python bench/run.py --threads 2", "rows": [RESULT | {"threads": 2, "median": 0.1}, RESULT | {"room": "codecs", "threads": 2}]}
    (tmp_path / "b.json").write_text(json.dumps(later))
    subprocess.run([*command[:3], str(tmp_path / "b.json"), *command[3:]], check=True)
    merged = page.read_text()
    assert "| solve | 4 × 4 | mrgptq | s | 0.25 (0.2–0.3) | 2.00 peer, 0.50 bound | 0.1 (0.2–0.3) | 2.00 peer, 0.50 bound |" in merged
    assert merged.index("`python bench/run.py`:") < merged.index("`python bench/run.py --threads 2`:") < merged.index("**gptq**") < merged.rindex("`python bench/run.py --threads 2`:") < merged.index("**codecs**")
    page.write_text(written)
    (tmp_path / "a.json").write_text(json.dumps(result | {"quick": True}))
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1 and "measures nothing" in refused.stderr and page.read_text() == written


def without(*names):
    """A good result that lacks what lies at the end of these names."""
    result = json.loads(json.dumps({"command": "python bench/run.py", "machine": MACHINE, "quick": False, "rows": [RESULT]}))
    part = result
    for name in names[:-1]:
        part = part[name]
    del part[names[-1]]
    return json.dumps(result)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "the result lacks command, machine, quick, rows"),
        (without("machine", "blas"), "the result.machine lacks blas"),
        (without("machine", "build", "isa"), "the result.machine.build lacks isa"),
        (without("rows", 0, "unit"), "row 0 lacks unit"),
        (without("rows", 0, "ratios"), "row 0 lacks ratios"),
        (without("rows", 0).replace("[]", "3"), "its rows are no list"),
    ],
)
def test_what_is_no_result_is_refused_in_a_sentence(content, said, tmp_path):
    given, page = tmp_path / "given.json", tmp_path / "README.md"
    given.write_text(content)
    page.write_text("as it was")
    done = subprocess.run([sys.executable, str(BENCH / "tables.py"), str(given), "--readme", str(page)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(str(given)) and said in done.stderr and "nothing was written" in done.stderr
    assert page.read_text() == "as it was"


def test_the_tables_of_rooms_that_are_left_out_are_not_written_over():
    done = subprocess.run([sys.executable, str(BENCH / "run.py"), "--rooms", "codecs", "--write"], capture_output=True, text=True)
    assert done.returncode == 2 and "use --json, and give tables.py that file" in done.stderr


def test_a_fingerprint_is_that_of_what_was_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    machine, tables = importlib.import_module("machine"), importlib.import_module("tables")
    here = machine.describe()["installed"]
    shutil.copytree(Path(mrgptq.__file__).parent, tmp_path / "mrgptq")
    ask = f"import sys; sys.path.insert(0, {str(BENCH)!r}); import machine; print(machine.installed())"

    def elsewhere():
        return ast.literal_eval(subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}).stdout)

    assert elsewhere() == here  # another folder, the same files
    with (tmp_path / "mrgptq" / "display.py").open("a") as file:
        file.write("# changed\n")
    changed = elsewhere()
    assert changed["extension"] == here["extension"] and changed["python"] != here["python"] and not changed["as_checkout"]
    assert f"(extension {here['extension']}, Python files {changed['python']}) whose Python files are not those of the checkout at revision abc," in tables.about(MACHINE | {"installed": changed})
    said = tables.about(MACHINE | {"installed": here | {"as_checkout": True}, "ggml": {"version": "0.9", "commit": None, "fingerprint": "1234"}})
    assert f"Python files {here['python']}) at revision abc," in said and "ggml 0.9 (1234)" in said
