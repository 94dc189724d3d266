"""Checkpoints are complete or absent, verified before use, and free of pickle."""

import errno
import json
import os
import pickletools
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from moa_train import checkpoint
from moa_train.checkpoint import FILES, DamagedCheckpoint, SaveError, Saver, TrainState
from moa_train.errors import ConfigError, RunError


def trained(seed, steps=3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def state_of(step):
    return asdict(TrainState(step, wall_s=1.5))


def save(folder, step, seed=0, steps=3, keep_latest=2):
    tensors = checkpoint.snapshot(*trained(seed, steps), {"0.cpu": torch.get_rng_state()})
    return checkpoint.save(folder, state_of(step), tensors, keep_latest=keep_latest)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    path = save(tmp_path, 7, seed=1)
    generator = torch.get_rng_state()
    reference, reference_optimizer = trained(1)
    model, optimizer = trained(2, steps=1)
    state, generators = checkpoint.load(path, model, optimizer)
    assert (state.step, state.wall_s) == (7, 1.5) and torch.equal(generators["0.cpu"], generator)
    for pair in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(*pair)
        left, right = optimizer.state[pair[0]], reference_optimizer.state[pair[1]]
        assert left.keys() == right.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(left[key], right[key]) for key in left)


def test_tied_weights_are_saved_once(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    optimizer = torch.optim.AdamW(model.parameters())
    tensors = checkpoint.snapshot(model, optimizer, {})
    assert list(tensors[FILES[0]]) == ["a.weight"]
    path = checkpoint.save(tmp_path, state_of(1), tensors, keep_latest=1)
    weight = model["a"].weight.detach().clone()
    nn.init.zeros_(model["b"].weight)
    checkpoint.load(path, model, optimizer)
    assert torch.equal(model["a"].weight, weight) and model["b"].weight is model["a"].weight


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, step)
    assert names(tmp_path) == ["LAST", "step_00000010", "step_00000015"]
    assert (tmp_path / "LAST").read_text() == "step_00000015\n"


def test_later_checkpoints_are_superseded(tmp_path):
    for step in (5, 10, 15, 20):
        save(tmp_path, step, keep_latest=9)
    save(tmp_path, 12, keep_latest=1)
    assert names(tmp_path) == ["LAST", "step_00000012"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5, seed=1)
    model, optimizer = trained(3)
    checkpoint.load(save(tmp_path, 5, seed=2), model, optimizer)
    assert torch.equal(model[0].weight, trained(2)[0][0].weight)


def test_nothing_is_pickled(tmp_path):
    for file in save(tmp_path, 1).iterdir():
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                assert tensors.keys() is not None
        else:
            json.loads(file.read_text())
        with pytest.raises(ValueError, match=r"opcode|pickle|newline"):  # of genops, for other files
            list(pickletools.genops(file.read_bytes()))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped bit": flip,
    "missing": Path.unlink,
    "other content": lambda path: path.write_text("[]"),
}


@pytest.mark.parametrize("file", [*FILES, "state.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_named_and_skipped(tmp_path, file, damage):
    good, bad = save(tmp_path, 5), save(tmp_path, 10)
    DAMAGE[damage](bad / file)
    newest, (problem,) = checkpoint.newest_valid(tmp_path)
    assert newest == good and f"step_00000010/{file}" in problem
    with pytest.raises(DamagedCheckpoint):
        checkpoint.verify(bad)


@pytest.mark.parametrize("failing", ["save_file", "write_text"])
def test_failed_save_leaves_the_old_checkpoint(tmp_path, failing, monkeypatch):
    save(tmp_path, 5)

    def no_space(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, failing, no_space)
        with pytest.raises(SaveError, match=r"step_00000010 could not be written: .*No space"):
            save(tmp_path, 10)
    assert (tmp_path / "LAST").read_text() == "step_00000005\n"
    assert not checkpoint.newest_valid(tmp_path)[1]
    save(tmp_path, 10)
    assert names(tmp_path) == ["LAST", "step_00000005", "step_00000010"]


def test_checkpoint_of_another_model_is_refused(tmp_path):
    path = save(tmp_path, 5)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    with pytest.raises(ConfigError, match=r"step_00000005 belongs to another model: 0.bias, 0.weight, 1.weight"):
        checkpoint.load(path, model, torch.optim.AdamW(model.parameters()))


def test_unreadable_checkpoint_is_not_skipped(tmp_path, monkeypatch):
    save(tmp_path, 5)
    save(tmp_path, 10)

    def failing(path):
        raise OSError(errno.ESTALE, "for a while", str(path))

    monkeypatch.setattr(checkpoint, "_file_sha256", failing)
    with pytest.raises(RunError, match=r"step_00000010 cannot be read \(.*for a while"):
        checkpoint.newest_valid(tmp_path)


def test_saver_raises_the_error_of_the_save_before(tmp_path, monkeypatch):
    saver = Saver(tmp_path, keep_latest=1)
    tensors = checkpoint.snapshot(*trained(0), {})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", lambda *args: (tmp_path / "missing/file").write_text(""))
        saver.begin({"step": 1}, tensors)
        with pytest.raises(SaveError, match="step_00000001"):
            saver.begin({"step": 2}, tensors)
    saver.begin({"step": 3}, tensors)
    saver.wait()
    assert names(tmp_path) == ["LAST", "step_00000003"]


def test_files_are_synced_before_the_rename(tmp_path, monkeypatch):
    calls, sync, rename = [], os.fsync, os.rename

    def synced(descriptor):
        calls.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    def renamed(source, target):
        calls.append(f"-> {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    save(tmp_path / "checkpoints", 5)
    visible = calls.index("-> step_00000005")
    assert {*FILES, "state.json"} <= set(calls[:visible])
    assert calls[visible - 1] == ".step_00000005.tmp" and calls[visible + 1] == "checkpoints"
