"""Exports of masked autoencoders that something has damaged: each is read, or refused in one message.

`timm.create_model("local-dir:FOLDER", pretrained=True)` by itself is timm's, and its errors are its own; here the
probes call it.
"""

import json
import pickle
from dataclasses import asdict

import pytest
import torch
import yaml

from moa_vision.export import export_encoder, load_mae
from moa_vision.mae import create_mae
from moa_vision.probe.command import ProbeConfig, data_config, known_result, tell, write_result
from moa_vision.probe.encoders import find_encoder

# torch warns of a layer without inputs before it is refused
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")

ENCODER = {
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 2,
    "patch_size": 8,
    "ffn_mixing_gate": "tanh",
    "drop_path_rate": 0.1,
}
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "decoder_ffn": None, "mask_ratio": 0.75}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The export in a run folder; whoever damages it mends it."""
    folder = tmp_path_factory.mktemp("run") / "export"
    data = {"train": "train", "val": "val", "workers": 0, "val_crop_pct": 1.0, "max_bad_samples": 3}
    (folder.parent / "config.yaml").write_text(yaml.safe_dump({"name": "run", "data": data}))
    (folder.parent / "summary.json").write_text(json.dumps({"steps": 12, "status": "finished"}))
    mae = create_mae("vit_tiny_patch16_qdmoa", img_size=32, encoder_args=ENCODER, **DECODER)
    export_encoder(mae, folder, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    numbers = {"train_samples": 9, "val_samples": 9, "accuracy": 0.5, "top5": 0.9, "wall_s": 1.0}
    config, encoder = ProbeConfig(runs=[str(folder.parent)]), find_encoder(folder)
    write_result(config, encoder, "knn", settings=asdict(config.knn), **numbers)
    assert known_result(config, encoder)["accuracy"] == 0.5
    return folder


def test_whole_autoencoders(fuzz, fuzzing, folder):
    def attempt(example):
        name, content = example
        with fuzzing.replaced(folder / name, content):
            error = fuzzing.refusal(lambda: load_mae(folder), ValueError)
        assert error is None or str(folder / "mae.json") in str(error), error

    fuzz(fuzzing.damage(folder, ("mae.json", "mae.json", "mae.safetensors")), attempt, examples=8)


@pytest.mark.parametrize(
    "key", ["checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"]
)
def test_arguments_that_name_files_are_refused(fuzzing, folder, tmp_path, monkeypatch, key):
    """timm takes them beside a model's own, and unpickles what they name."""
    file = tmp_path / "weights.pth"
    torch.save({}, file)
    value = {"pretrained": True, "checkpoint_path": str(file), "cache_dir": str(tmp_path)}.get(key, {"file": str(file)})
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
        with fuzzing.replaced(folder / name, json.dumps(content).encode()), pytest.raises(ValueError, match=key):
            read()
    assert not loaded


def test_encoders_of_runs(fuzz, fuzzing, folder):
    """What a probe reads of a run, before it reads images."""
    run = folder.parent
    keys = ("data.", "train is", "val is")  # of the configuration

    def look():
        config, encoder = ProbeConfig(runs=[str(run)]), find_encoder(run)
        data_config(config, encoder)
        if found := known_result(config, encoder):
            tell(found, run)
        assert min(encoder.image_size) > 0
        encoder.features("avg")
        encoder.identity()

    def attempt(example):
        name, content = example
        with fuzzing.replaced(run / name, content):
            error = fuzzing.refusal(look, ValueError)
        assert error is None or str(error).startswith(keys) or str(run) in str(error), error

    names = ("export/config.json", "export/config.json", "export/model.safetensors", "config.yaml", "summary.json")
    names += ("probe/knn.json",)
    fuzz(fuzzing.damage(run, names), attempt, examples=8)
