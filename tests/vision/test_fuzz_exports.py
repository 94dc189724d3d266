"""Damaged exports and run folders: each is read, or refused with one message that names the file."""

import json
import pickle

import pytest
import torch
import yaml
from hypothesis import strategies as st

from moa_train.errors import ConfigError, DataError
from moa_vision.export import export_encoder, load_mae
from moa_vision.mae import create_mae
from moa_vision.probe.config import ProbeConfig
from moa_vision.probe.encoders import find_encoder
from moa_vision.probe.methods import data_config

# torch warns about a layer without inputs before it is refused
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")

ENCODER = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8, "ffn_mixing_gate": "tanh"}
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "decoder_ffn": None, "mask_ratio": 0.75}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An export in a run folder; tests restore what they damage."""
    folder = tmp_path_factory.mktemp("run") / "export"
    data = {"train": "train", "val": "val", "workers": 0, "val_crop_pct": 1.0, "max_bad_samples": 3}
    (folder.parent / "config.yaml").write_text(yaml.safe_dump({"name": "run", "data": data}))
    (folder.parent / "summary.json").write_text(json.dumps({"steps": 12, "status": "finished"}))
    mae = create_mae("vit_tiny_patch16_qdmoa", img_size=32, encoder_args=ENCODER, **DECODER)
    export_encoder(mae, folder, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    return folder


def damaged_files(fuzzing, folder, *names):
    """Return a strategy of (name, content); numbers stay small, because a model of any size would be allocated."""
    small = [value for value in fuzzing.ODD if not isinstance(value, int | float) or abs(value) <= 7]

    def damaged(name):
        content = (folder / name).read_bytes()
        if not name.endswith(".json"):
            return fuzzing.file_like(folder / name)
        trees = fuzzing.mutated(json.loads(content), odd=small).map(fuzzing.as_json)
        return trees | st.integers(0, len(content)).map(lambda end: content[:end])

    return st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), damaged(name)))


def test_damaged_mae_exports(fuzz, fuzzing, folder):
    def attempt(example):
        name, content = example
        with fuzzing.replaced(folder / name, content):
            error = fuzzing.refusal(lambda: load_mae(folder), ValueError, DataError)
        assert error is None or str(folder / "mae.json") in str(error), error

    fuzz(damaged_files(fuzzing, folder, "mae.json", "mae.json", "mae.safetensors"), attempt, examples=8)


def test_damaged_run_folders(fuzz, fuzzing, folder):
    run = folder.parent

    def read():
        encoder = find_encoder(run)
        data_config(ProbeConfig(runs=[str(run)]), encoder)
        encoder.features("avg")
        encoder.identity()

    def attempt(example):
        name, content = example
        with fuzzing.replaced(run / name, content):
            error = fuzzing.refusal(read, ValueError, DataError, ConfigError)
        assert error is None or str(run) in str(error) or str(error).startswith(("data.", "train is", "val is")), error

    names = ("export/config.json", "export/config.json", "export/model.safetensors", "config.yaml", "summary.json")
    fuzz(damaged_files(fuzzing, run, *names), attempt, examples=8)


@pytest.mark.parametrize("key", ["checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"])
def test_arguments_that_name_files_are_refused(fuzzing, folder, tmp_path, monkeypatch, key):
    """timm would unpickle the files that these arguments name."""
    file = tmp_path / "weights.pth"
    torch.save({}, file)
    value = {"pretrained": True, "checkpoint_path": str(file)}.get(key, {"file": str(file)})
    loaded = []
    for module, reader in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, reader, lambda *_, **__: loaded.append(1))
    readers = (
        ("config.json", ("model_args",), lambda: find_encoder(folder).features("avg")),
        ("mae.json", ("model", "encoder_args"), lambda: load_mae(folder)),
        ("mae.json", ("model",), lambda: load_mae(folder)),
    )
    for name, path, read in readers:
        content = part = json.loads((folder / name).read_text())
        for step in path:
            part = part[step]
        part[key] = value
        with fuzzing.replaced(folder / name, json.dumps(content).encode()), pytest.raises(DataError, match=key):
            read()
    assert not loaded
