"""The house itself: arrows between rooms, one version, stubs, examples and documentation that run."""

import ast
import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import mrgptq
from snippets import run_page

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "mrgptq"
CPP_ROOMS = ["base", "simd", "linalg", "formats", "rotations", "codecs", "gptq", "matmul", "bindings"]
PYTHON_ROOMS = "_core display arrays packing formats rotations transforms result codecs activations gptq prepack matmul recipe layer group modules checkpoint plan identity tasks hf jobs study arguments cli".split()
FORKED = ["bench/bench_accuracy.py", "bench/bench_best.py", "bench/bench_layers.py", "bench/bench_model.py"]
ONLY_IN = {"torch": "hf", "transformers": "hf", "matplotlib": "study/plots.py", "tqdm": "cli.py"}


def cpp_arrows():
    """(file, including room, included room) for every include of a file of ours."""
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".h", ".cc"):
            for included in re.findall(r'#include "(\w+)/', path.read_text()):
                yield path.relative_to(ROOT), path.parent.name, included


def test_cpp_rooms_include_only_rooms_before_them():
    arrows = list(cpp_arrows())
    assert len(arrows) > 20
    wrong = [arrow for arrow in arrows if CPP_ROOMS.index(arrow[2]) > CPP_ROOMS.index(arrow[1]) or arrow[1:] == ("matmul", "gptq")]  # beside each other
    assert not wrong


def test_only_gptq_includes_eigen_and_only_parallel_h_names_openmp():
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text()
        assert path.parent.name == "gptq" or "<Eigen" not in text, path
        assert path.name in ("parallel.h", "module.cc") or not re.search(r"\bomp_|#pragma omp|_OPENMP", text), path


def python_imports(path):
    """Absolute names of what a file imports, relative imports resolved."""
    package = ("mrgptq", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield from ([f"{module}.{alias.name}" for alias in node.names] if node.module is None or module == "mrgptq" else [module])


def room_of(module):
    """The room of a dotted module name below mrgptq."""
    name = module.split(".")[1]
    return "_core" if name == "_cpu" else name


def python_files():
    """Every source file of the package but its front door and the specification."""
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).as_posix() not in ("__init__.py", "reference.py")]


@pytest.mark.parametrize("path", python_files(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_python_rooms_import_only_rooms_before_them(path):
    room = room_of("mrgptq." + path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."))
    for module in python_imports(path):
        if module.startswith("mrgptq."):
            imported = room_of(module)
            if imported == "__version__":
                assert room == "arguments", f"{path.name} imports the front door"
            elif imported != room:
                assert PYTHON_ROOMS.index(imported) < PYTHON_ROOMS.index(room), f"{room} imports {module}"
        elif (top := module.split(".")[0]) in ONLY_IN:
            assert path.relative_to(PACKAGE).as_posix().startswith(ONLY_IN[top]), f"{path.name} imports {top}"


def test_reference_imports_numpy_alone():
    assert {module.split(".")[0] for module in python_imports(PACKAGE / "reference.py")} == {"numpy"}


def test_core_needs_numpy_alone():
    forbid = "import sys\nfor name in ('torch', 'transformers', 'ml_dtypes', 'tqdm', 'matplotlib', 'safetensors', 'scipy'):\n    sys.modules[name] = None\n"
    run = "import numpy as np, mrgptq as mg\nfrom mrgptq import cli, jobs\nprint(mg.quantize_layer(np.ones((2, 32)), np.eye(32), 'mr-gptq', format='mxfp4').report.method)"
    done = subprocess.run([sys.executable, "-c", forbid + run], capture_output=True, text=True)
    assert done.stdout == "gptq\n", done.stderr


def test_there_is_one_version():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert declared == mrgptq.__version__ == version("mrgptq") == mrgptq.build_info()["version"]
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[headings[0] == "Unreleased"] == declared and "Unreleased" not in headings[1:]  # what is not released yet stands first and has no number
    numbered = [path for path in ROOT.rglob("*.py") if ".venv" not in path.parts and "build" not in path.parts and re.search(r"__version__\s*=\s*[\"']", path.read_text())]
    assert not numbered


def test_stub_matches_the_module(tmp_path):
    allowed = tmp_path / "allowed"
    # pybind11 gives its classes a metaclass of its own, which no stub can name.
    allowed.write_text("mrgptq._core.CholeskyFactor\nmrgptq._core.HessianSum\nmrgptq._core.SecondMoment\n")
    done = subprocess.run([sys.executable, "-m", "mypy.stubtest", "mrgptq._core", "--allowlist", str(allowed)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_package_is_typed():
    assert (Path(mrgptq.__file__).parent / "py.typed").is_file()
    done = subprocess.run([sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")], capture_output=True, text=True, cwd=ROOT / "python")
    assert done.returncode == 0, done.stdout + done.stderr


def public_modules():
    """Names of all modules of the installed package but the compiled ones."""
    return [name for _, name, _ in pkgutil.walk_packages(mrgptq.__path__, "mrgptq.") if "._c" not in name]


def test_everything_public_says_what_it_is():
    for name in public_modules():
        module = importlib.import_module(name)
        assert module.__doc__, name
        for attribute, value in vars(module).items():
            if not attribute.startswith("_") and getattr(value, "__module__", None) == name and callable(value):
                assert value.__doc__, f"{name}.{attribute}"


def test_docstring_examples_run():
    results = [doctest.testmod(importlib.import_module(name), extraglobs={"np": __import__("numpy"), "mg": mrgptq}) for name in public_modules()]
    assert sum(result.attempted for result in results) >= 5
    assert not sum(result.failed for result in results)


def test_readme_python_runs(tmp_path):
    assert run_page(ROOT / "README.md", tmp_path) >= 2


def test_readme_shows_the_make_targets():
    makefile, readme = (ROOT / "Makefile").read_text(), (ROOT / "README.md").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    assert targets == ["demo", "docs", "test"] and all(f"make {target}" in readme for target in targets)


def test_constraints_satisfy_the_declared_bounds():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"], *sum(project["project"]["optional-dependencies"].values(), [])]
    for requirement in wanted:
        name, bound = re.match(r"([\w.-]+)>=([\d.]+)", requirement).groups()
        assert [int(part) for part in pins[name].split(".")[:2]] >= [int(part) for part in bound.split(".")[:2]], requirement


@pytest.mark.parametrize("script", ["examples/quantize_array.py", "examples/demo.py", "bench/bench_accuracy.py", "bench/bench_best.py", "bench/bench_layers.py", "bench/bench_memory.py", "bench/bench_model.py", "bench/run.py"])
def test_scripts_run(script, tmp_path, request):
    """Those that the README names, those that measure memory and those that look at their own environment in processes of nothing else."""
    leaf, text = ROOT / "examples" / "models" / "leaf", ROOT / "examples" / "text"
    arguments = {
        "demo.py": ["--out", str(tmp_path / "demo"), "--windows", "2"],
        "bench_accuracy.py": ["--model", str(leaf), "--calibration", str(text / "calibration.txt"), "--text", str(text / "test.txt"), "--windows", "2", "--test-windows", "2", "--rows", "mr-gptq 16"],
        "bench_best.py": ["--model", str(leaf), "--calibration", str(text / "calibration.txt"), "--text", str(text / "test.txt"), "--far", str(text / "test.txt"), "--sets", "2", "--windows", "2", "--test-windows", "2", "--far-windows", "2", "--rows", "nvfp4 W4A4"],
        "run.py": ["--quick", "--compare", "--threads", "1", "2", "--json", str(tmp_path / "results.json")],
        "bench_model.py": ["--model", str(leaf), "--calibration", str(text / "calibration.txt"), "--tokens", "1024"],
        "bench_memory.py": ["--tokens", "512", "--runs", "mr-gptq under Hessians", "mr-gptq"],
        "bench_layers.py": ["--model", str(leaf), "--calibration", str(text / "calibration.txt"), "--held-out", str(text / "test.txt"), "--windows", "2", "--rows", "nvfp4 16 even mr-gptq"],
    }.get(Path(script).name, [])
    if script in FORKED:
        done = request.getfixturevalue("forks").run(ROOT / script, *arguments, cwd=tmp_path)
    else:
        done = subprocess.run([sys.executable, str(ROOT / script), *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mr-gptq" in done.stdout.lower()


def test_every_script_is_run_above():
    files = list((ROOT / "bench").glob("*.py"))
    scripts = {path.relative_to(ROOT).as_posix() for path in [*(ROOT / "examples").glob("*.py"), *(path for path in files if "__main__" in path.read_text())]} - {"bench/tables.py"}  # tested in test_bench.py
    mark = next(mark for mark in test_scripts_run.pytestmark if mark.name == "parametrize")
    assert scripts == set(mark.args[1])
    measuring = {path.stem for path in files if "\ndef measure(" in path.read_text()}
    assert {"bench_codecs", "bench_gptq", "bench_matmul", "bench_rotations", "bounds"} <= measuring
    # Every benchmark is a program of its own or one that run.py finds.
    assert all(path.stem in measuring or "__main__" in path.read_text() for path in files if path.name.startswith("bench_"))
