"""What lies where a run keeps its parts is not taken on trust: links, parts that no run wrote, a folder at OUT that is somebody else's."""

import json
import shutil

import pytest
import safetensors.numpy

from folders import contents

import mrgptq as mg
from mrgptq import cli
from mrgptq.jobs import quantize_checkpoint
from mrgptq.plan import make_plan


def stop_at(layer):
    def progress(stage, done, total):
        if done == layer:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("what", ["lock", "result", "manifest.json", "00000.safetensors"])
@pytest.mark.parametrize("restart", [False, True], ids=["", "restart"])
def test_links_among_what_is_left_are_refused_and_what_they_lead_to_stays(what, restart, leaf_folder, tmp_path, capsys):
    """A model's folder may bring such a trap along for whoever quantises into it."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "thesis").write_text("thesis")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / what).symlink_to(tmp_path / "docs" if what == "result" else tmp_path / "docs" / "thesis")
    assert cli.main(["quantize", str(leaf_folder), str(tmp_path / "out"), "--recipe", "rtn", *["--restart"] * restart]) == 1
    assert f".out.partial/{what} is a link" in capsys.readouterr().err
    assert (tmp_path / "docs" / "thesis").read_text() == "thesis" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("restart", [False, True], ids=["", "restart"])
def test_a_link_in_the_place_of_the_hidden_folder_is_refused(restart, leaf_folder, tmp_path, capsys):
    (tmp_path / "docs" / "sub").mkdir(parents=True)
    (tmp_path / "docs" / "sub" / "thesis").write_text("thesis")
    (tmp_path / ".out.partial").symlink_to("docs")
    assert cli.main(["quantize", str(leaf_folder), str(tmp_path / "out"), "--recipe", "rtn", *["--restart"] * restart]) == 1
    assert ".out.partial is a link" in capsys.readouterr().err
    assert contents(tmp_path / "docs") == {"sub/thesis": b"thesis"}


@pytest.mark.parametrize("copied", [True, False])
def test_after_a_result_could_not_be_written_another_folder_is_not_taken_for_it(copied, leaf_folder, tmp_path, monkeypatch):
    """Somebody's checkpoint, or an empty folder, that is at OUT by then: all parts were done, but nothing was made of them."""

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    plan = make_plan(leaf_folder, tmp_path / "out", mg.Recipe.named("rtn"))
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr("mrgptq.checkpoint.writer.write_file", full)
        quantize_checkpoint(plan)
    if copied:
        quantize_checkpoint(make_plan(leaf_folder, tmp_path / "other", mg.Recipe.named("rtn", "mxfp4")))
        shutil.copytree(tmp_path / "other", tmp_path / "out")
    else:
        (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError):
        make_plan(leaf_folder, tmp_path / "out", mg.Recipe.named("rtn"))
    shutil.rmtree(tmp_path / "out")
    quantize_checkpoint(make_plan(leaf_folder, tmp_path / "out", mg.Recipe.named("rtn")))
    quantize_checkpoint(make_plan(leaf_folder, tmp_path / "whole", mg.Recipe.named("rtn")))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


DAMAGES = {
    "no layer": (lambda layers, tensors: layers.clear(), "holds other layers"),
    "other rows": (lambda layers, tensors: tensors.update({name: value[:8].copy() for name, value in tensors.items()}), "codes of 8 x 384, its report is of"),
    "other rows everywhere": (lambda layers, tensors: (tensors.update({name: value[:8].copy() for name, value in tensors.items()}), [layer["report"].update(rows=8) for layer in layers.values()]), "holds other layers"),
    "a scale that is no number": (lambda layers, tensors: [layer.update(tensor_scale=float("nan")) for layer in layers.values()], "tensor_scale"),
    "no format": (lambda layers, tensors: [layer.pop("format") for layer in layers.values()], "KeyError: 'format'"),
    "a word for a report": (lambda layers, tensors: [layer.update(report="fine") for layer in layers.values()], "not described as a run describes"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_refused_by_name(damage, leaf_folder, tmp_path):
    change, words = DAMAGES[damage]
    plan = make_plan(leaf_folder, tmp_path / "out", mg.Recipe.named("rtn"))
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(plan, progress=stop_at(5))
    (part,) = [path for path in (tmp_path / ".out.partial").glob("*.safetensors") if "down_proj" in path.read_bytes().decode(errors="ignore")][:1]
    with safetensors.safe_open(part, "np") as file:
        tensors, layers = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["layers"])
    change(layers, tensors)
    part.unlink()
    safetensors.numpy.save_file(tensors, part, {"layers": json.dumps(layers)})
    with pytest.raises(ValueError, match=words) as failure:
        quantize_checkpoint(plan)
    assert part.name in str(failure.value) and not (tmp_path / "out").exists()
