"""Runs that are cut short: killed at any moment they are finished by the same command, to the same bytes."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from folders import contents
from interrupted import stop_at

import mrgptq as mg
from mrgptq import cli
from mrgptq.jobs import quantize_checkpoint
from mrgptq.plan import make_plan

KILLS = int(os.environ.get("MRGPTQ_KILLS", "4"))  # of each kind of run; CONTRIBUTING.md says how to try more


@pytest.fixture(scope="module")
def text_file(tmp_path_factory, calibration_text):
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(calibration_text[:60_000], encoding="utf-8")
    return path


# The command, and what it is given beside MODEL OUT.
RUNS = {
    "observed": lambda text, stored_hessians: ["calibrate", "--calibration", str(text), "--tokens", "1024", "--sequence", "128"],
    "rounded": lambda text, stored_hessians: ["quantize", "--recipe", "rtn", "--max-shard-bytes", "300000"],
    "under stored Hessians": lambda text, stored_hessians: ["quantize", "--recipe", "mr-gptq", "--hessians", str(stored_hessians)],
    "calibrated": lambda text, stored_hessians: ["quantize", "--recipe", "best", "--calibration", str(text), "--tokens", "1024", "--sequence", "128"],
    "calibrated W4A4": lambda text, stored_hessians: ["quantize", "--recipe", "mr-gptq", "--activations", "nvfp4", "--calibration", str(text), "--tokens", "1024", "--sequence", "128"],
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_killed_at_any_moment_is_finished_by_the_same_command_to_the_same_bytes(kind, leaf_folder, text_file, stored_hessians, tmp_path, forks):
    """At random moments of what an undisturbed run took last, each process killed being one of two or three to the same output. The seed is printed, and another one each day."""

    def run(out, kill_after=None):
        command, *options = RUNS[kind](text_file, stored_hessians)
        return forks.run("mrgptq", command, leaf_folder, out, "--threads", 1, *options, cwd=tmp_path, kill_after=kill_after)

    whole = run(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    expected = contents(tmp_path / "whole")
    seed = int(time.time()) // 86400
    print("seed", seed)
    draw, killed, number, seconds = random.Random(seed), 0, 0, whole.seconds
    while killed < KILLS and number < 8 * KILLS:
        number += 1
        out = tmp_path / f"out{number}"
        for last in (False, False, True):
            new = not (tmp_path / f".{out.name}.partial").exists()
            done = run(out, None if last else draw.uniform(0, 1) * seconds)
            if new and done.returncode == 0:
                seconds = done.seconds  # what else the machine has to do may have changed
            assert done.returncode == (0 if last else done.returncode) and done.returncode in (0, -signal.SIGKILL), done.stderr
            killed += done.returncode != 0
            hidden = tmp_path / f".{out.name}.partial"
            left = {path.name for path in tmp_path.iterdir()} - {"whole", hidden.name} - {f"out{n + 1}" for n in range(number)}
            assert not left and (not out.exists() or contents(out) == expected)  # whole or not at all, nothing beside the hidden folder
            if out.exists() and not (hidden / "assembling.json").exists():  # nothing is left to do, whenever after that it was killed
                break
        assert contents(out) == expected
        if hidden.exists():  # killed while it removed the folder, of which these go last
            assert done.returncode and {path.name for path in hidden.iterdir()} <= {"lock", "result.json"}
            shutil.rmtree(hidden)
    assert killed >= KILLS


def killed_while_it_sweeps(plan, swept, monkeypatch):
    """A run whose result has its name, and that removes so many of its files after that."""
    left, unlink = [swept], os.unlink

    def killed(path, *args, **kwargs):
        if plan.out.exists():
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        unlink(path, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "unlink", killed)
        quantize_checkpoint(plan)
    assert sorted(path.name for path in plan.out.parent.iterdir()) == [".out.partial", "out"]


@pytest.mark.parametrize("swept", [0, 1, 5, 16])
def test_a_run_that_was_finished_before_it_could_say_so_is_taken_as_it_is(swept, leaf_folder, tmp_path, monkeypatch):
    """Killed between the result's name and the removal of its parts, or while they are removed; by the same command alone."""
    recipe = mg.Recipe.named("rtn")
    killed_while_it_sweeps(make_plan(leaf_folder, tmp_path / "out", recipe), swept, monkeypatch)
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r'recipe\.format "nvfp4"; this one has "mxfp4"'):
        quantize_checkpoint(make_plan(leaf_folder, tmp_path / "out", mg.Recipe.named("rtn", "mxfp4")))
    again = make_plan(leaf_folder, tmp_path / "out", recipe)
    assert again.finished
    reports = quantize_checkpoint(again)
    assert len(reports) == 28 and reports["model.layers.0.mlp.up_proj"].method == "rounding"
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and contents(tmp_path / "out") == before
    with pytest.raises(FileExistsError, match="out exists already"):
        make_plan(leaf_folder, tmp_path / "out", recipe)


@pytest.mark.parametrize("swept", [17, 18])
def test_a_run_killed_when_only_its_empty_folder_is_left_has_ended(swept, leaf_folder, tmp_path, monkeypatch):
    """Nothing tells any more whose the result is: it is whole, and is not overwritten."""
    for folder in ("whole", "run"):
        (tmp_path / folder).mkdir()
    quantize_checkpoint(make_plan(leaf_folder, tmp_path / "whole" / "out", mg.Recipe.named("rtn")))
    plan = make_plan(leaf_folder, tmp_path / "run" / "out", mg.Recipe.named("rtn"))
    killed_while_it_sweeps(plan, swept, monkeypatch)
    assert not list((tmp_path / "run" / ".out.partial").glob("*.safetensors"))
    with pytest.raises(FileExistsError, match="out exists already, a whole checkpoint that a run ended with; it is never"):
        make_plan(leaf_folder, plan.out, mg.Recipe.named("rtn"))
    assert contents(plan.out) == contents(tmp_path / "whole" / "out")


def test_the_marks_of_a_finished_run_go_last(leaf_folder, tmp_path, monkeypatch):
    """Of what is swept up all else by its name, then what a run is, then the folder with what tells its result and the lock."""
    swept, unlink = [], type(tmp_path).unlink
    monkeypatch.setattr(type(tmp_path), "unlink", lambda self, *args, **kwargs: (swept.append(self.name), unlink(self, *args, **kwargs)))
    quantize_checkpoint(make_plan(leaf_folder, tmp_path / "out", mg.Recipe.named("rtn")))
    assert swept[-1] == "assembling.json" and len(swept) == 17 and all(name.endswith(".safetensors") for name in swept[:-1])


def test_two_processes_do_not_write_the_same_output(leaf_folder, tmp_path):
    plan = make_plan(leaf_folder, tmp_path / "out", mg.Recipe.named("rtn"))
    refused = []

    def progress(stage, done, total):
        if done == 5:
            code = f"from mrgptq.cli import main; import sys; sys.exit(main(['quantize', {str(leaf_folder)!r}, {str(tmp_path / 'out')!r}, '--recipe', 'rtn']))"
            refused.append(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True))

    quantize_checkpoint(plan, progress=progress)
    assert refused[0].returncode == 1 and "another process is writing" in refused[0].stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_part_under_way_is_swept_and_one_that_is_done_is_not_done_again(leaf_folder, tmp_path):
    plan = make_plan(leaf_folder, tmp_path / "out", mg.Recipe.named("rtn"))
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(plan, progress=stop_at(9))
    folder = tmp_path / ".out.partial"
    (folder / "00004.safetensors.tmp-1-aa").write_bytes(b"half of it")
    (folder / "result").mkdir()
    (folder / "result" / "shard-0.safetensors").write_bytes(b"half of it")
    parts = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(parts) >= 4
    seen = []

    def progress(stage, done, total):
        seen.append({path.name: path.stat().st_mtime_ns for path in folder.iterdir()})

    quantize_checkpoint(plan, progress=progress)
    assert all(state.items() >= parts.items() and not any(".tmp-" in name for name in state) for state in seen)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and len(list((tmp_path / "out").glob("*.safetensors"))) == 1


def test_restart_passes_no_result_off_as_anothers(leaf_folder, tmp_path, capsys):
    """One that is there, whose run could not say that it was finished."""
    assert cli.main(["quantize", str(leaf_folder), str(tmp_path / "out"), "--recipe", "rtn"]) == 0
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "assembling.json").write_text("{}")
    before = contents(tmp_path / "out")
    assert cli.main(["quantize", str(leaf_folder), str(tmp_path / "out"), "--recipe", "rtn", "--format", "mxfp4", "--restart"]) == 1
    assert "out exists already" in capsys.readouterr().err and contents(tmp_path / "out") == before


def test_a_folder_of_somebody_elses_is_not_taken_for_the_result(leaf_folder, tmp_path, monkeypatch):
    """Killed while the checkpoint is made of its parts; then another puts something at OUT."""
    plan = make_plan(leaf_folder, tmp_path / "out", mg.Recipe.named("rtn"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mrgptq.jobs.save", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt()))
        quantize_checkpoint(plan)
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out exists already"):
        make_plan(leaf_folder, tmp_path / "out", mg.Recipe.named("rtn"))
    (tmp_path / "out").rmdir()
    quantize_checkpoint(plan)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_restart_throws_away_what_is_left(leaf_folder, tmp_path, capsys):
    from mrgptq import cli

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(make_plan(leaf_folder, tmp_path / "out", mg.Recipe.named("rtn")), progress=stop_at(9))
    command = ["quantize", str(leaf_folder), str(tmp_path / "out"), "--recipe", "rtn", "--format", "mxfp4"]
    assert cli.main(command) == 1 and cli.main([*command, "--restart"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and "28 layers" in capsys.readouterr().out


def test_what_a_run_would_go_on_from_is_gone_when_the_checkpoint_is_made(leaf_folder, calibration_text, tmp_path, monkeypatch):
    """It may be as large as the checkpoint."""
    from mrgptq import jobs

    save, seen = jobs.save, []
    monkeypatch.setattr(jobs, "save", lambda *args, **kwargs: (seen.extend(path.name for path in (tmp_path / ".out.partial").iterdir()), save(*args, **kwargs)))
    quantize_checkpoint(make_plan(leaf_folder, tmp_path / "out", mg.Recipe.named("best"), tokens=256, sequence=64), calibration_text, threads=1)
    assert sorted(seen) == [*(f"{number:05d}.safetensors" for number in range(16)), "assembling.json", "lock", "result", "result.json"]


def test_a_folder_that_cannot_be_written_is_named(leaf_folder, tmp_path, monkeypatch):
    """As a read-only filesystem answers."""
    plan = make_plan(leaf_folder, tmp_path / "out", mg.Recipe.named("rtn"))

    def refuse(self, *args, **kwargs):
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(OSError, match=r"could not write .*\.out\.partial: Read-only file system"):
        quantize_checkpoint(plan)
    assert list(tmp_path.iterdir()) == []


def test_a_part_says_what_it_holds(leaf_folder, tmp_path):
    """Each group of layers is a safetensors file that the library reads, codes and scales as mg.quantize_layer gives them."""
    plan = make_plan(leaf_folder, tmp_path / "out", mg.Recipe.named("rtn"))
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(plan, progress=stop_at(1))
    part = sorted((tmp_path / ".out.partial").glob("0*.safetensors"))[0]
    tensors = safetensors.numpy.load_file(part)
    with safetensors.safe_open(part, "np") as file:
        layers = json.loads(file.metadata()["layers"])
    assert {re.sub(r"\.(codes|scales)$", "", name) for name in tensors} == set(layers)
    weights = mg.load(leaf_folder)
    for name, layer in layers.items():
        q = mg.quantize_layer(weights[f"{name}.weight"], None, plan.recipe, tensor_scale=layer["tensor_scale"])
        assert np.array_equal(tensors[f"{name}.codes"], q.codes) and np.array_equal(tensors[f"{name}.scales"], q.scales)
