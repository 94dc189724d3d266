"""A checkpoint is complete or absent, and checked before it is used."""

import errno
import json
import os
import pickletools
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from moa_train import checkpoint
from moa_train.checkpoint import FILES, DamagedCheckpoint, NotSaved, NotTidied, Saver, Unreadable


def trained(seed, steps=3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def save(folder, step, seed=0, steps=3, keep=2):
    model, optimizer = trained(seed, steps)
    state = {"step": step, "wall_s": 1.5}
    tensors = checkpoint.snapshot(model, optimizer, {"0.cpu": torch.get_rng_state()})
    return checkpoint.save(folder, state, tensors, keep=keep)


def test_round_trip(tmp_path):
    path = save(tmp_path, 7, seed=1)
    generator = torch.get_rng_state()
    reference, reference_optimizer = trained(1)
    model, optimizer = trained(2, steps=1)
    state, generators = checkpoint.load(path, model, optimizer)
    assert (state["step"], state["wall_s"]) == (7, 1.5) and torch.equal(generators["0.cpu"], generator)
    for pair in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(*pair)
        left, right = optimizer.state[pair[0]], reference_optimizer.state[pair[1]]
        assert left.keys() == right.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(left[key], right[key]) for key in left)


def test_before_the_first_step(tmp_path):
    model, optimizer = trained(2)
    checkpoint.load(save(tmp_path, 0, steps=0), model, optimizer)
    assert not optimizer.state


def test_tied_weights(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    optimizer = torch.optim.AdamW(model.parameters())
    path = checkpoint.save(tmp_path, {"step": 1}, checkpoint.snapshot(model, optimizer, {}), keep=1)
    weight = model["a"].weight.detach().clone()
    nn.init.zeros_(model["b"].weight)
    checkpoint.load(path, model, optimizer)
    assert torch.equal(model["a"].weight, weight) and model["b"].weight is model["a"].weight


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LAST", "step_00000010", "step_00000015"]
    assert (tmp_path / "LAST").read_text() == "step_00000015\n"


def test_later_ones_are_superseded_and_do_not_count(tmp_path):
    """Damaged ones of a session before: the new ones are kept in their place."""
    for step in (5, 10, 15, 20):
        save(tmp_path, step, keep=9)
    for step in (15, 20):
        (tmp_path / f"step_{step:08d}" / "model.safetensors").write_bytes(b"")
    save(tmp_path, 12, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LAST", "step_00000012"]
    assert checkpoint.newest_valid(tmp_path) == (tmp_path / "step_00000012", [])


def test_a_state_that_is_no_json_is_not_saved(tmp_path):
    model, optimizer = trained(0)
    with pytest.raises(NotSaved, match=r"step_00000001 could not be written: .*JSON"):
        checkpoint.save(tmp_path, {"step": 1, "x": float("inf")}, checkpoint.snapshot(model, optimizer, {}), keep=1)


def test_nothing_is_pickled(tmp_path):
    for file in save(tmp_path, 1).iterdir():
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                assert tensors.keys() is not None
        else:
            json.loads(file.read_text())
        with pytest.raises(ValueError, match=r"opcode|pickle|newline"):  # what genops says of other files
            list(pickletools.genops(file.read_bytes()))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped bit": flip,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("file", [*FILES, "state.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_passed_over(tmp_path, file, damage):
    good, bad = save(tmp_path, 5), save(tmp_path, 10)
    if (file, damage) == ("state.json", "flipped bit"):
        (bad / file).write_text((bad / file).read_text().replace('"sha256": "', '"sha256": "0'))
        file = FILES[0]
    else:
        DAMAGE[damage](bad / file)
    newest, damaged = checkpoint.newest_valid(tmp_path)
    assert newest == good
    assert len(damaged) == 1 and f"step_00000010/{file}" in damaged[0]
    with pytest.raises(DamagedCheckpoint):
        checkpoint.verify(bad)


@pytest.mark.parametrize("state", ["[]", '{"step": 1}', '{"step": "x", "files": {}}', "null"])
def test_nonsense_in_state(tmp_path, state):
    (save(tmp_path, 5) / "state.json").write_text(state)
    newest, damaged = checkpoint.newest_valid(tmp_path)
    assert newest is None and "step_00000005/state.json" in damaged[0]


@pytest.mark.parametrize("failing", ["save_file", "write_json", "write_text"])
def test_a_failed_save_leaves_the_old_one(tmp_path, failing, monkeypatch):
    old = save(tmp_path, 5)

    def no_space(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, failing, no_space)
        untidied = failing == "write_text"  # of LAST: the checkpoint is there
        what = "step_00000010 is saved, but LAST" if untidied else "step_00000010 could not be written"
        with pytest.raises(NotTidied if untidied else NotSaved, match=f"{what}.*No space"):
            save(tmp_path, 10)
    assert (tmp_path / "LAST").read_text() == f"{old.name}\n"
    newest, damaged = checkpoint.newest_valid(tmp_path)
    assert not damaged and newest == (tmp_path / "step_00000010" if failing == "write_text" else old)
    save(tmp_path, 10)  # what the failed one left does not disturb
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LAST", "step_00000005", "step_00000010"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5, seed=1)
    path = save(tmp_path, 5, seed=2)
    model, optimizer = trained(3)
    checkpoint.load(path, model, optimizer)
    assert torch.equal(model[0].weight, trained(2)[0][0].weight)


def test_another_model_is_refused(tmp_path):
    path = save(tmp_path, 5)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    with pytest.raises(ValueError, match="step_00000005 belongs to another model"):
        checkpoint.load(path, model, torch.optim.AdamW(model.parameters()))


def steps(folder):
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*"))


def test_one_in_passing_lasts_until_the_next_and_does_not_count(tmp_path):
    saver, seen = Saver(tmp_path, keep=2, keep_every=None), []
    tensors = checkpoint.snapshot(*trained(0), {})
    for step in (5, 10, 15, 20, 25, 30):
        saver.begin({"step": step}, tensors, passing=step % 10 == 5)
        assert saver.outcome(wait=True) is None and saver.saved_step == step
        seen.append(steps(tmp_path))
    assert seen == [[5], [10], [10, 15], [10, 20], [10, 20, 25], [20, 30]]


@pytest.mark.parametrize("error", [errno.ESTALE, errno.EACCES, errno.EMFILE])
def test_one_that_cannot_be_read_now_is_not_taken_for_damaged(tmp_path, error, monkeypatch):
    """To go on from an older one would drop it, as a later one that is superseded."""
    save(tmp_path, 5), save(tmp_path, 10)
    failing, read = iter([True, True, False, True, True, True]), checkpoint._checksum

    def checksum(path):
        if path.name == "model.safetensors" and next(failing):
            raise OSError(error, "for a while")
        return read(path)

    monkeypatch.setattr(checkpoint, "_checksum", checksum)
    monkeypatch.setattr(checkpoint, "_PAUSES_S", (0, 0))
    assert checkpoint.newest_valid(tmp_path) == (tmp_path / "step_00000010", []), "the third time"
    with pytest.raises(Unreadable, match=r"step_00000010/model.safetensors cannot be read now"):
        checkpoint.newest_valid(tmp_path)


def test_an_error_of_the_disk_is_damage_once_it_stays(tmp_path, monkeypatch):
    save(tmp_path, 5), save(tmp_path, 10)
    failing, read = iter([True, True, False, True, True, True]), checkpoint._checksum

    def checksum(path):
        if path.parent.name == "step_00000010" and path.name == "model.safetensors" and next(failing):
            raise OSError(errno.EIO, "for once, or for good")
        return read(path)

    monkeypatch.setattr(checkpoint, "_checksum", checksum)
    monkeypatch.setattr(checkpoint, "_PAUSES_S", (0, 0))
    assert checkpoint.newest_valid(tmp_path) == (tmp_path / "step_00000010", []), "the third time"
    newest, (damaged,) = checkpoint.newest_valid(tmp_path)
    assert newest == tmp_path / "step_00000005" and "step_00000010/model.safetensors cannot be read" in damaged


def test_it_is_on_the_disk_before_it_can_be_seen(tmp_path, monkeypatch):
    """Rows, then the files, then the folder that lists them; then the name; then the folder that has the name."""
    rows, calls = tmp_path / "metrics.jsonl", []
    rows.write_text("{}\n")
    sync, rename = os.fsync, os.rename

    def synced(descriptor):
        calls.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    def renamed(source, target):
        calls.append(f"-> {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder, {"step": 5}, checkpoint.snapshot(*trained(0), {}), keep=1, beside=(rows, tmp_path / "no"))
    seen = calls.index("-> step_00000005")
    assert calls[0] == "metrics.jsonl" and calls[seen - 1] == ".step_00000005.tmp"
    assert {*FILES, "state.json"} <= set(calls[1 : seen - 1]) and calls[seen + 1] == "checkpoints"
