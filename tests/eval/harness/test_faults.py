"""Faulty checkpoints are refused in one line."""

import json
import os
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BartConfig,
    LlamaForCausalLM,
    ViTConfig,
)

from moa_eval.harness import MoALM, ModelError
from moa_train.errors import DataError

pytestmark = pytest.mark.filterwarnings("default")  # of lm-eval and datasets


def set_nan(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(folder)


def change_width(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))


def truncate_weights(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])


FAULTS = {  # fault -> how to make it in a good checkpoint, or arguments; the message
    "no folder": (shutil.rmtree, "does not exist"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json: pass a checkpoint"),
    "adapter": (
        lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
        "it is an adapter, pass pretrained=BASE,peft=",
    ),
    "unknown type": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "foo"}'),
        "cannot read the config of .*foo",
    ),
    "vit": (lambda folder: ViTConfig().save_pretrained(folder), "of type 'vit', not a causal language model"),
    "encoder-decoder": (  # which transformers lists among the causal models, too
        lambda folder: BartConfig().save_pretrained(folder),
        "of type 'bart', not a causal language model",
    ),
    "no tokenizer": (
        lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
        "cannot load a tokenizer from .*tokenizer=NAME_OR_DIR",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "cannot load the weights of .*model.safetensors",
    ),
    "truncated": (truncate_weights, "model.safetensors is truncated or damaged"),
    "shapes": (change_width, "cannot load the weights of .*ignore_mismatched_sizes"),
    "nan": (set_nan, "has NaN or infinity in model.layers.1.mlp.up_proj.weight"),
    "argument": ({"max_lenght": 7}, "cannot load the weights of .*unexpected keyword argument 'max_lenght'"),
    "truncation": ({"truncation": "right"}, "truncation='right' is not available: choose left, skip, error"),
    "dtype": ({"dtype": "floaty"}, "dtype='floaty' is not a dtype"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_reported_in_one_line(fault, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    make, message = FAULTS[fault]
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints / "llama", folder)
    arguments = make if isinstance(make, dict) else {}
    if not arguments:
        make(folder)
    with pytest.raises(DataError, match=message) as caught:
        MoALM(str(folder), device="cpu", **arguments)
    assert isinstance(caught.value, SystemExit)  # ends lm-eval's command line without a traceback
    assert caught.value.code == f"moa: {caught.value}"
    assert "\n" not in str(caught.value)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("place", ["pytorch_model.bin", "index", "adapter_model.bin"])
def test_pickled_weights_are_refused(place, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch, "load", lambda *_, **__: Path("unpickled").mkdir())
    base = folder = tmp_path / "checkpoint"
    arguments = {}
    shutil.copytree(checkpoints / "llama", folder)
    (folder / "model.safetensors").unlink()
    pickled = folder / ("adapter_model.bin" if place == "adapter_model.bin" else "pytorch_model.bin")
    torch.save({"weight": Trap()}, pickled)
    if place == "adapter_model.bin":
        (folder / "config.json").rename(folder / "adapter_config.json")
        base, arguments = checkpoints / "llama", {"peft": str(folder)}
    if place == "index":
        index = {"metadata": {}, "weight_map": {"model.norm.weight": pickled.name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=rf"{folder} has pickled weights \({pickled.name}\)"):
        MoALM(str(base), device="cpu", **arguments)
    if place == "pytorch_model.bin":
        save_file({}, folder / "model.extra.safetensors")  # transformers must not fall back to the pickle
        with pytest.raises(ModelError, match=f"cannot load the weights of {folder}.*no file named model.safetensors"):
            MoALM(str(folder), device="cpu", use_safetensors=False)
    assert not (tmp_path / "unpickled").exists()
