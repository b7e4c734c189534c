import errno
import os
import pickle
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint
from pipeline.checkpoint import CheckpointFolder, load_checkpoint, load_weights
from pipeline.errors import StorageError, UserError
from pipeline.models import create_model


@pytest.fixture
def folder(tmp_path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path)


def state(step: int) -> dict:
    return {"model": {"w": torch.full((3,), float(step))}, "config": {}, "classes": ["a"], "step": step}


def test_the_last_two_and_the_best_are_kept(folder):
    assert folder.find() == (None, [])
    for step in range(4):
        folder.save(state(step), best=step == 1)
    assert [load_checkpoint(path)["step"] for path in (folder.last, folder.previous, folder.best)] == [3, 2, 1]
    assert sorted(os.listdir(folder.last.parent)) == ["best.pt", "last.pt", "previous.pt"]


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "empty"])
def test_a_damaged_last_checkpoint_is_passed_over_loudly(folder, damage):
    folder.save(state(0), best=False)
    folder.save(state(1), best=False)
    content = bytearray(folder.last.read_bytes())
    if damage == "flipped bit":
        content[len(content) // 2] ^= 1
    folder.last.write_bytes({"cut short": content[:-100], "empty": b""}.get(damage, content))
    names = sorted(os.listdir(folder.last.parent))
    found, damaged = folder.find()
    assert (found.state["step"], found.path, damaged) == (0, folder.previous, [folder.last])
    assert sorted(os.listdir(folder.last.parent)) == names  # to look changes nothing
    with pytest.warns(UserWarning, match="last.pt is damaged and now called last.damaged; resuming from previous.pt"):
        found.set_damaged_aside()
    folder.save(state(2), best=False)  # must not put the damaged one in the place of the good one
    assert [load_checkpoint(path)["step"] for path in (folder.last, folder.previous)] == [2, 0]
    folder.last.write_bytes(b"")
    with pytest.warns(UserWarning, match="now called last.damaged1"):  # the first stays
        folder.find()[0].set_damaged_aside()
    folder.previous.write_bytes(b"")
    assert folder.find() == (None, [folder.previous])


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_a_checkpoint_that_cannot_be_read_just_now_is_not_damaged(folder, monkeypatch, number):
    """The one before is no way out either: it would be renamed to the last at the next save."""
    folder.save(state(0), best=False)
    folder.save(state(1), best=False)
    read = Path.read_bytes

    def fail(path):
        if path.name == "last.pt":
            raise OSError(number, os.strerror(number))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    passes = number in (errno.EIO, errno.ESTALE)  # so that a launcher tries again
    with pytest.raises(
        StorageError if passes else UserError, match=f"cannot read the checkpoint .*last.pt: {os.strerror(number)}"
    ):
        folder.find()
    assert sorted(os.listdir(folder.last.parent)) == ["last.pt", "previous.pt"]


def test_checkpoints_of_the_format_before_are_read_under_todays_names(folder, monkeypatch):
    old = state(0) | {
        "config": {"data": {"mirror": True}, "optim": {"accumulation": 2}},
        "conditions": {"ranks": 3},
        "epoch_totals": torch.ones(3, 4),
    }
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    folder.save(old, best=False)
    monkeypatch.undo()
    found = load_checkpoint(folder.last)
    assert found["config"] == {"data": {"hflip": True}, "optim": {"grad_accum_steps": 2}}
    assert torch.equal(found["epoch_metrics"]["by_rank"], torch.ones(3, 4))
    assert found["history"]["segments"] == [{"step": 0, "epoch": 0, "ranks": 3, "grad_accum_steps": 2, "changed": {}}]


@pytest.mark.parametrize("written", [0, 1])
def test_a_save_that_fails_leaves_the_old_checkpoints(folder, monkeypatch, written):
    """The disk is full while the best, or the last, is written."""
    folder.save(state(0), best=True)
    folder.save(state(1), best=True)
    real, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(1)
        if len(calls) > written:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="No space left on device"):
        folder.save(state(2), best=True)
    steps = [load_checkpoint(path)["step"] for path in (folder.last, folder.previous, folder.best)]
    assert steps == [1, 0, 1 if written == 0 else 2]


def test_every_flipped_bit_is_noticed(folder):
    folder.save(state(0), best=False)
    content = folder.last.read_bytes()
    for position in range(0, len(content), 37):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        folder.last.write_bytes(damaged)
        with pytest.raises(UserError):
            load_checkpoint(folder.last)


def test_torch_reads_the_file_as_it_is(folder):
    folder.save(state(5), best=False)
    assert torch.load(folder.last, weights_only=True)["step"] == 5


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-code-ran",)


@pytest.mark.parametrize("kind", ["pickle", "torch.save of it", "text", "other torch file", "missing"])
def test_other_files_are_refused_in_one_line(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "other.pt"
    if kind == "pickle":
        file.write_bytes(pickle.dumps(Hostile()))
    elif kind == "torch.save of it":
        torch.save(Hostile(), file)
    elif kind == "text":
        file.write_text("hello" * 100)
    elif kind == "other torch file":
        torch.save({"state_dict": {}}, file)
    with pytest.raises(UserError, match="other.pt") as failure:
        load_checkpoint(file)
    assert "\n" not in str(failure.value) and not (tmp_path / "hostile-code-ran").exists()


def test_code_in_a_file_with_a_right_checksum_does_not_run_either(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    folder.save({**state(0), "model": Hostile()}, best=False)
    with pytest.raises(UserError, match="last.pt"):
        load_checkpoint(folder.last)
    assert not (tmp_path / "hostile-code-ran").exists()


def test_weights_of_another_network_are_refused_by_name_and_shape():
    network = create_model("densenet_bc40_k12", num_classes=3)
    for other, expected in (
        (create_model("densenet_bc40_k12", num_classes=4), "'classifier.weight' has another shape .*number of classes"),
        (create_model("densenet40_k12", num_classes=3), "another shape|another architecture"),
        (create_model("timm:resnet18", num_classes=3), "another architecture"),
    ):
        before = {name: value.clone() for name, value in network.state_dict().items()}
        with pytest.raises(UserError, match=expected):
            load_weights(network, other.state_dict(), "x.pt")
        for name, value in network.state_dict().items():
            assert torch.equal(value, before[name])
