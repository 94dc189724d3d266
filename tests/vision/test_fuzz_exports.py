"""Exports of masked autoencoders that something has damaged: each is read, or refused in one message.

`timm.create_model("local-dir:FOLDER", pretrained=True)` by itself is timm's, and its errors are its own; here the
probes call it.
"""

import json

import pytest
import yaml

from moa_vision.export import export_encoder, load_mae
from moa_vision.mae import create_mae
from moa_vision.probe.command import ProbeConfig, data_config
from moa_vision.probe.encoders import find_encoder

# torch warns of a layer without inputs before it is refused
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")

ENCODER = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8, "ffn_gate": "tanh", "drop_path_rate": 0.1}
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
    return folder


def test_whole_autoencoders(fuzz, fuzzing, folder):
    def attempt(example):
        name, content = example
        with fuzzing.replaced(folder / name, content):
            error = fuzzing.refusal(lambda: load_mae(folder), ValueError)
        assert error is None or str(folder / "mae.json") in str(error), error

    fuzz(fuzzing.damage(folder, ("mae.json", "mae.json", "mae.safetensors")), attempt, examples=8)


def test_encoders_of_runs(fuzz, fuzzing, folder):
    """What a probe reads of a run, before it reads images."""
    run = folder.parent
    keys = ("data.", "train is", "val is")  # of the configuration

    def look():
        encoder = find_encoder(run)
        data_config(ProbeConfig(runs=[str(run)]), encoder)
        assert min(encoder.image_size) > 0
        encoder.features("avg")
        encoder.identity()

    def attempt(example):
        name, content = example
        with fuzzing.replaced(run / name, content):
            error = fuzzing.refusal(look, ValueError)
        assert error is None or str(error).startswith(keys) or str(run) in str(error), error

    names = ("export/config.json", "export/config.json", "export/model.safetensors", "config.yaml", "summary.json")
    fuzz(fuzzing.damage(run, names), attempt, examples=8)
