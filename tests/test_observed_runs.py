"""Runs of `mrgptq calibrate` that are cut short: the same command goes on from the block they were at."""

import errno
import fcntl
import json
import os
import shutil

import numpy as np
import pytest

from folders import contents
from interrupted import stop_at

import mrgptq as mg
from mrgptq import cli, hf, jobs
from mrgptq.checkpoint.partial_run import PartialRun, discard, write_part
from mrgptq.checkpoint.reader import CheckpointReader
from mrgptq.checkpoint.writer import publish
from mrgptq.jobs import quantize_checkpoint, store_hessians
from mrgptq.plan import make_plan, plan_calibration


@pytest.fixture
def plan(leaf_folder, tmp_path):
    return plan_calibration(leaf_folder, tmp_path / "h", tokens=1024, sequence=128)


@pytest.fixture(scope="module")
def expected(leaf_folder, calibration_text, tmp_path_factory):
    """What is stored of the Hessians that layers give when the whole model is run at once."""
    folder = tmp_path_factory.mktemp("expected") / "h"
    hf.use_threads(1)
    inputs = hf.token_windows(hf.load_tokenizer(leaf_folder), calibration_text, 8, 128)
    mg.save_hessians(folder, hf.collect_hessians(hf.load_model(leaf_folder), inputs, list(plan_calibration(leaf_folder, folder).shapes), threads=1))
    return contents(folder)


def cut_short(plan, text, layers=15):
    """By Ctrl-C, when so many of leaf's 28 layers are done, before the last of them is kept; 15: in the third of four blocks."""

    def progress(stage, done, total):
        assert (stage, total) == ("calibrate", 28)
        if done >= layers:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as interrupt:
        store_hessians(plan, text, threads=1, progress=progress)
    return interrupt.value


@pytest.mark.parametrize(("layers", "kept", "told"), [(15, 14, [15, 17, 20, 21, 22, 24, 27, 28]), (24, 22, [22, 24, 27, 28]), (28, 27, [22, 24, 27, 28])])
@pytest.mark.parametrize("streamed", [False, True])
def test_it_goes_on_from_the_block_it_was_at(streamed, layers, kept, told, plan, expected, calibration_text, leaf_folder, tmp_path, monkeypatch, caplog):
    if streamed:
        monkeypatch.setattr("mrgptq.plan.RESIDENT_BYTES", 0)
        plan = plan_calibration(leaf_folder, plan.out, tokens=1024, sequence=128)
    assert plan.streamed == streamed
    interrupt = cut_short(plan, calibration_text, layers)
    assert interrupt.__notes__ == [f"what is done is kept in {tmp_path / '.h.partial'}: the same command goes on from there"]
    assert [path.name for path in tmp_path.iterdir()] == [".h.partial"]
    (tmp_path / ".h.partial" / "result" / "00001.safetensors.tmp-1-aa").write_bytes(b"half of it")
    unfinished, seen, passed = [], [], []
    run_block = hf.blocks.run_block
    monkeypatch.setattr("mrgptq.hf.blocks.run_block", lambda block, *args: (passed.append(id(block)), unfinished.extend(tmp_path.rglob("*.tmp-*")), run_block(block, *args))[2])
    assert store_hessians(plan, calibration_text, threads=1, progress=lambda *state: seen.append(state)) == 1024
    assert [done for _, done, _ in seen] == told and len(set(passed)) == len(told) // 4 and not unfinished
    assert "going on from" in caplog.text and f"the Hessians of {kept} of 28 layers are done" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["h"] and contents(plan.out) == expected
    with pytest.raises(FileExistsError, match="h exists already"):
        plan_calibration(leaf_folder, plan.out)


def test_only_the_same_command_goes_on(plan, expected, calibration_text, leaf_folder, tmp_path, capsys, caplog):
    cut_short(plan, calibration_text)
    kept = contents(tmp_path / ".h.partial")
    with pytest.raises(ValueError, match="SHA-256 of the calibration text"):
        store_hessians(plan, calibration_text + ".", threads=1)
    with pytest.raises(ValueError, match=r"begun by a run with sequence 128; this one has 64"):
        store_hessians(plan_calibration(leaf_folder, plan.out, tokens=1024, sequence=64), calibration_text, threads=1)
    with pytest.raises(ValueError, match=r'begun by a run with device "cpu"; this one has "cuda"'):
        store_hessians(plan, calibration_text, threads=1, device="cuda")
    for recipe in ("mr-gptq", "rtn"):
        with pytest.raises(ValueError, match=r'begun by a run with command "mrgptq calibrate"; this one has "mrgptq quantize"'):
            quantize_checkpoint(make_plan(leaf_folder, plan.out, mg.Recipe.named(recipe), tokens=1024, sequence=128), calibration_text, threads=1)
    assert contents(tmp_path / ".h.partial") == kept
    (tmp_path / "text").write_text(calibration_text, encoding="utf-8")
    command = ["calibrate", str(leaf_folder), str(plan.out), "--calibration", str(tmp_path / "text"), "--tokens", "1024", "--sequence", "128", "--threads", "1"]
    other = [*command[:-1], "2"]
    assert cli.main(other) == 1 and "begun by a run with threads 1; this one has 2" in capsys.readouterr().err
    assert cli.main([*other, "--restart"]) == 0 and contents(plan.out).keys() == expected.keys()
    shutil.rmtree(plan.out)
    cut_short(plan, calibration_text)
    capsys.readouterr()
    assert cli.main(command) == 0 and contents(plan.out) == expected
    assert capsys.readouterr().out == f"{plan.out}: Hessians of 28 layers, 1024 tokens\n" and "14 of 28 layers are done" in caplog.text


@pytest.mark.parametrize("moment", ["before the name", "after it"])
def test_a_run_killed_when_all_is_done_observes_nothing_more(moment, plan, expected, calibration_text, leaf_folder, tmp_path, monkeypatch):
    """What a run that is interrupted tidies up, one that is killed leaves: it must do for both."""

    def killed(building, path):
        if moment == "after it":
            publish(building, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mrgptq.jobs.publish", killed)
        store_hessians(plan, calibration_text, threads=1)
    assert sorted(path.name for path in (tmp_path / ".h.partial").iterdir()) == ["assembling.json", "lock", "result" if moment == "before the name" else "result.json"]
    with monkeypatch.context() as patch:
        patch.setattr("mrgptq.hf.observe_hessians", None)
        again = plan_calibration(leaf_folder, plan.out, tokens=1024, sequence=128)
        assert again.finished == (moment == "after it") and store_hessians(again, calibration_text, threads=1) == 1024
    assert [path.name for path in tmp_path.iterdir()] == ["h"] and contents(plan.out) == expected


@pytest.mark.parametrize("removed", [2, 4, 12])
def test_what_an_interrupted_restart_left_is_nobodys(removed, plan, expected, calibration_text, leaf_folder, tmp_path, monkeypatch):
    """Whatever had been removed by then, its other parts are not taken for those of another text."""
    (tmp_path / "other").write_text(calibration_text[50_000:60_000], encoding="utf-8")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mrgptq.jobs.write_index", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        store_hessians(plan, (tmp_path / "other").read_text(encoding="utf-8"), threads=1)
    unlink, seen = os.unlink, []

    def killed(path, *args, **kwargs):
        if len(seen) == removed:
            raise KeyboardInterrupt
        seen.append(os.path.basename(path))
        unlink(path, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "unlink", killed)
        discard(plan.out)
    assert seen[:2] == ["manifest.json", "assembling.json"] and any((tmp_path / ".h.partial" / "result").iterdir())
    assert store_hessians(plan, calibration_text, threads=1) == 1024 and contents(plan.out) == expected


def test_another_folder_in_the_place_of_a_finished_one_is_not_the_runs(plan, calibration_text, leaf_folder, tmp_path, monkeypatch):
    """A filesystem may give it the inode of the one that is gone."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mrgptq.jobs.publish", lambda *arguments: (publish(*arguments), (_ for _ in ()).throw(KeyboardInterrupt)))
        store_hessians(plan, calibration_text, threads=1)
    finished = plan_calibration(leaf_folder, plan.out, tokens=1024, sequence=128)
    assert finished.finished
    os.truncate(plan.out / "00003.safetensors", 9)
    with pytest.raises(ValueError, match=r"00003\.safetensors"):
        store_hessians(finished, calibration_text, threads=1)
    for path in plan.out.iterdir():
        path.unlink()
    (plan.out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="h exists already"):
        plan_calibration(leaf_folder, plan.out, tokens=1024, sequence=128)


def test_what_is_there_already_asks_for_no_room(plan, expected, calibration_text, tmp_path, monkeypatch):
    """On a disk that held the run from the first it goes on to the end, in the middle of it and where only the index is missing."""
    room = plan.bytes_out + plan.kept_bytes + 8192 * 17 + 4096  # the manifest

    def free(path):
        used = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        return shutil._ntuple_diskusage(room, used, room - used)

    monkeypatch.setattr(shutil, "disk_usage", free)
    cut_short(plan, calibration_text, 24)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free(path).free - 2**17))
        with pytest.raises(OSError, match=r"h needs \d+ bytes more than what is kept, but its filesystem has only"):
            store_hessians(plan, calibration_text, threads=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mrgptq.jobs.write_index", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        store_hessians(plan, calibration_text, threads=1)
    room -= plan.kept_bytes
    assert store_hessians(plan, calibration_text, threads=1) == 1024 and contents(plan.out) == expected


def test_a_run_whose_layers_are_done_asks_for_the_checkpoints_room_alone(leaf_folder, calibration_text, tmp_path, monkeypatch):
    """Nothing more is kept between blocks then."""
    plan = make_plan(leaf_folder, tmp_path / "out", mg.Recipe.named("gptq"), tokens=1024, sequence=128)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(plan, calibration_text, threads=1, progress=stop_at(28))
    reader = CheckpointReader(leaf_folder)
    needed = plan.bytes_out + jobs._small_bytes(plan, reader, reader.side_files())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, needed - 1))
    with pytest.raises(OSError, match=rf"out needs {needed} bytes more than what is kept, but its filesystem has only {needed - 1} free"):
        quantize_checkpoint(plan, calibration_text, threads=1)
    needed += 1
    assert len(quantize_checkpoint(plan, calibration_text, threads=1)) == 28


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (lambda folder: shutil.copy(folder / "result" / "00000.safetensors", folder / "hidden.safetensors"), r"hidden\.safetensors is not what a run keeps between blocks; remove the folder"),
        (lambda folder: write_part(folder / "hidden.safetensors", {"hidden.0": np.zeros((8, 128, 64), np.float32)}, {"blocks": "2"}), r"what was kept between blocks is of other hidden states than these; remove the folder"),
        (lambda folder: write_part(folder / "hidden.safetensors", {"hidden.0": np.zeros((8, 128, 128), np.float16)}, {"blocks": "2"}), r"what was kept between blocks is of other hidden states than these; remove the folder"),
        (lambda folder: write_part(folder / "hidden.safetensors", {"hidden.0": np.zeros((8, 128, 128), np.float32)}, {"blocks": "-1"}), r"hidden\.safetensors is not what a run keeps between blocks"),
        (lambda folder: (folder / "result" / "evil").symlink_to("/etc/passwd"), r"result/evil is a link; a run keeps"),
        (lambda folder: ((folder / "lock").unlink(), os.mkfifo(folder / "lock")), r"lock is no ordinary file"),
    ],
    ids=["another part", "other hidden states", "other numbers", "no number", "link", "pipe"],
)
def test_what_no_run_keeps_is_refused(plant, words, plan, calibration_text, tmp_path):
    cut_short(plan, calibration_text)
    plant(tmp_path / ".h.partial")
    with pytest.raises(ValueError, match=words):
        store_hessians(plan, calibration_text, threads=1)
    assert not plan.out.exists()


def test_what_else_lies_in_the_folder_is_neither_published_nor_written(plan, expected, calibration_text, tmp_path):
    cut_short(plan, calibration_text)
    folder, victim = tmp_path / ".h.partial", tmp_path / "victim"
    victim.write_text("mine")
    (folder / "lock").unlink()
    os.link(victim, folder / "lock")
    (folder / "result" / "notes.txt").write_text("mine")
    (folder / "result" / "x.tmp-1-aa").mkdir()
    assert store_hessians(plan, calibration_text, threads=1) == 1024
    assert contents(plan.out) == expected and victim.read_text() == "mine"


def test_what_another_run_wrote_meanwhile_is_told_before_the_text_is_passed(plan, expected, calibration_text, leaf_folder, tmp_path, monkeypatch):
    """Both were planned when nothing was there."""
    store_hessians(plan, calibration_text, threads=1)
    monkeypatch.setattr("mrgptq.jobs._windows", None)
    with pytest.raises(FileExistsError, match="h exists already and is not overwritten") as refusal:
        store_hessians(plan, calibration_text, threads=1)
    assert not hasattr(refusal.value, "__notes__") and [path.name for path in tmp_path.iterdir()] == ["h"] and contents(plan.out) == expected


def test_a_tokenizer_that_changes_while_it_is_read_is_told(leaf_folder, calibration_text, tmp_path, monkeypatch):
    model, windows = tmp_path / "model", jobs._windows
    shutil.copytree(leaf_folder, model)
    monkeypatch.setattr("mrgptq.jobs._windows", lambda *arguments: (windows(*arguments), os.utime(model / "tokenizer.json", (1, 1)))[0])
    with pytest.raises(ValueError, match=r"model file\.tokenizer\.json has changed from .* while the run was at work"):
        store_hessians(plan_calibration(model, tmp_path / "h", tokens=256, sequence=64), calibration_text, threads=1)
    assert not (tmp_path / "h").exists()


def test_a_lock_that_was_removed_by_who_held_it_is_none(plan, calibration_text, tmp_path, monkeypatch):
    """Between the opening of the lock and its taking another run may end: the folder is made anew."""
    flock, opened = fcntl.flock, []

    def late(file, operation):
        if not opened:
            opened.append(file)
            shutil.rmtree(tmp_path / ".h.partial")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with PartialRun(plan.out, dict) as run:
        assert run.folder.is_dir() and opened[0].closed
        with pytest.raises(BlockingIOError, match=r"another process is writing .*h: it holds .*lock"):
            PartialRun(plan.out, dict).__enter__()


def test_restart_throws_nothing_away_before_all_is_well(plan, calibration_text, leaf_folder, tmp_path, capsys):
    cut_short(plan, calibration_text)
    kept = contents(tmp_path / ".h.partial")
    (tmp_path / "text").write_text(calibration_text, encoding="utf-8")
    calibrate, quantize = (["calibrate", str(leaf_folder), str(plan.out), "--restart"], ["quantize", str(leaf_folder), str(plan.out), "--restart"])
    for command in ([*calibrate, "--calibration", str(tmp_path / "no")], [*calibrate, "--calibration", str(tmp_path / "text"), "--memory-limit", "1"], [*quantize, "--recipe", "rtn", "--memory-limit", "1"], [*quantize, "--recipe", "rtn", "--dry-run", "--ignore", ""]):
        assert cli.main(command) == (1 if "--dry-run" not in command else cli.main(command)), command
        assert contents(tmp_path / ".h.partial") == kept
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(("spoil", "words"), [(lambda file: os.truncate(file, 300), r"00000\.safetensors"), (lambda file: shutil.copy(file.with_name("00001.safetensors"), file), r"00000\.safetensors is of 128 columns; .*down_proj has 384")], ids=["truncated", "another's"])
def test_a_part_that_is_not_what_was_kept_is_named_and_not_published(spoil, words, plan, calibration_text, tmp_path):
    cut_short(plan, calibration_text)
    spoil(tmp_path / ".h.partial" / "result" / "00000.safetensors")
    with pytest.raises(ValueError, match=words) as failure:
        store_hessians(plan, calibration_text, threads=1)
    assert "remove that folder to begin anew" in failure.value.__notes__[0] and [path.name for path in tmp_path.iterdir()] == [".h.partial"]


def test_what_will_not_fit_is_refused_before_the_text_is_passed(plan, calibration_text, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, plan.bytes_out + plan.kept_bytes))  # headers and the index are missing
        patch.setattr("mrgptq.hf.observe_hessians", None)
        with pytest.raises(OSError, match=rf"h needs \d+ bytes while it is made, .* only {plan.bytes_out + plan.kept_bytes} free") as refusal:
            store_hessians(plan, calibration_text, threads=1)
    assert refusal.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []
    used = []
    store_hessians(plan, calibration_text, threads=1, progress=lambda *state: used.append(sum(path.stat().st_size for path in (tmp_path / ".h.partial").rglob("*.safetensors"))))
    hidden = 4 * 1024 * 128
    assert plan.kept_bytes == 2 * hidden and hidden < max(used) < plan.bytes_out + plan.kept_bytes


def test_a_full_disk_leaves_what_is_done_and_no_result(plan, expected, calibration_text, tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="could not write .*No space left") as failure:
        patch.setattr(os, "fsync", full)
        store_hessians(plan, calibration_text, threads=1)
    assert "the same command goes on from there" in failure.value.__notes__[0] and not plan.out.exists()
    assert store_hessians(plan, calibration_text, threads=1) == 1024 and contents(plan.out) == expected


def test_a_filesystem_without_locks_is_warned_of(leaf_folder, tmp_path, monkeypatch, caplog):
    def refuse(error):
        def flock(file, operation):
            raise OSError(error, os.strerror(error))

        return flock

    monkeypatch.setattr("fcntl.flock", refuse(errno.ENOLCK))
    quantize_checkpoint(make_plan(leaf_folder, tmp_path / "out", mg.Recipe.named("rtn")))
    assert "has no locks (No locks available): nothing but you keeps a second run" in caplog.text and json.loads((tmp_path / "out" / "config.json").read_text())
    monkeypatch.setattr("fcntl.flock", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        quantize_checkpoint(make_plan(leaf_folder, tmp_path / "other", mg.Recipe.named("rtn")))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
