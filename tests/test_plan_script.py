"""scripts/plan.py against runs that really train, torch's counters, and the tables in docs/planning.md."""

import importlib
import json
import re
import shlex
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel  # torch 2.11's counter knows no other kernel on CPUs
from torch.utils.flop_counter import FlopCounterMode

from moa_ffn import FFN
from moa_lm.modeling import MoALlamaForCausalLM
from moa_lm.pretrain import LMConfig
from moa_lm.pretrain import main as train_lm
from moa_lm.sizes import named_config
from moa_lm.token_shards import TokenSettings, make_tokens
from moa_lm.workload import lm_workload, recorded_muon, saved_bytes
from moa_train.config import parse_config
from moa_train.devices import find_gpu
from moa_train.devices import saved_bytes as measure_saved_bytes
from moa_train.estimate import Target, estimate, measured_rate
from moa_vision.pretrain import MAEConfig, ModelConfig, build_mae
from moa_vision.pretrain import main as train_mae
from moa_vision.workload import mae_workload
from moa_vision.workload import recorded_muon as recorded_vision_muon

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/planning.md").read_text()
SETTINGS = {
    "schedule": {"batch_size": 8},
    "loop": {"micro_batch_size": 4, "log_every": 1, "num_diagnostic_samples": 0, "trackers": []},
    "checkpoint": {"interval": 2},
}
SMALL_MAE = {
    "encoder": "vit_tiny_patch16_qdmoa",
    "img_size": 16,
    "encoder_args": {"embed_dim": 96, "depth": 2, "num_heads": 2, "patch_size": 4},
    "decoder_dim": 64,
    "decoder_depth": 2,
    "decoder_heads": 2,
}

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "scripts")
    plan = importlib.import_module("plan")


def write_config(folder, tree):
    merged = {key: {**SETTINGS.get(key, {}), **value} for key, value in tree.items()}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({**SETTINGS, **merged, "out": str(folder), "name": "run"}))
    return file


def read_config(kind, file, *words):
    return parse_config(kind, [f"--config={file}", *words], program="test", summary="")


def check_against_run(folder, config, workload, muon, samples):
    """Compare the estimate for the run in `folder`, at its own throughput, with its records."""
    rate, source = measured_rate(folder, find_gpu("cpu"), muon)
    found = estimate(config, workload, Target(find_gpu("cpu"), rate, source), 1)
    summary = json.loads((folder / "summary.json").read_text())
    assert workload.parameters == summary["parameters"]
    assert found.plan.total_steps == summary["steps"]
    per_unit = summary.get("flops_per_sample", summary.get("flops_per_token"))
    assert workload.flops_per_sample / workload.units_per_sample == pytest.approx(per_unit, rel=1e-12)
    newest = max((folder / "checkpoints").glob("step_*"))
    assert found.checkpoint_bytes == pytest.approx(
        sum(file.stat().st_size for file in newest.iterdir()), rel=0.02
    )  # headers
    assert found.hours * 3600 == pytest.approx(summary["steps"] * samples / summary["throughput"])


def saved_bytes_per_sample(model, loss, example):
    """Return the bytes per sample that autograd saves for real tensors."""
    one, two = (measure_saved_bytes(lambda n=n: loss(example(n)), model.parameters()) for n in (1, 2))
    return two - one


def write_images(path, count):
    pixels = np.random.default_rng(0).integers(0, 255, (count, 24, 24, 3), dtype=np.uint8)
    with tarfile.open(path, "w") as tar:
        for number, image in enumerate(pixels):
            buffer = BytesIO()
            Image.fromarray(image).save(buffer, "JPEG")
            info = tarfile.TarInfo(f"{number:02d}.jpg")
            info.size = len(buffer.getvalue())
            tar.addfile(info, BytesIO(buffer.getvalue()))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_masked_autoencoder_that_trains(algorithm, tmp_path):
    write_images(tmp_path / "images.tar", 20)
    data = {"train": str(tmp_path / "images.tar"), "workers": 0, "cache_dir": str(tmp_path / "cache")}
    optim = {"algorithm": algorithm}
    file = write_config(tmp_path, {"model": SMALL_MAE, "data": data, "schedule": {"epochs": 4}, "optim": optim})
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train_mae(["--config", str(file)]) == 0
    config = read_config(MAEConfig, file)
    workload = mae_workload(config)
    assert bool(workload.muon) == (algorithm == "muon")
    check_against_run(tmp_path / "run", config, workload, recorded_vision_muon(tmp_path / "run"), samples=8)
    assert workload.samples_per_epoch == 20

    real = build_mae(ModelConfig(**SMALL_MAE))
    for module in real.modules():
        if isinstance(module, FFN):
            module.backend = "eager"
    noise = torch.linspace(0, 1, real.num_patches)

    def batch(count):
        return torch.zeros(count, 3, 16, 16), noise.expand(count, -1)

    assert workload.saved.per_sample == saved_bytes_per_sample(real, lambda b: real(*b).loss, batch)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        real(*batch(64))
    assert 3 * counter.get_total_flops() / 64 == pytest.approx(workload.flops_per_sample, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "algorithm", "fields"),
    [("dense-micro", "adamw", {}), ("moe-micro", "muon", {"moe_intermediate_size": 48})],
    ids=["dense", "experts"],
)
def test_language_model_that_trains(size, algorithm, fields, tmp_path):
    text = "".join(json.dumps({"text": f"the {n} kings had {n} daughters by the sea"}) + "\n" for n in range(200))
    (tmp_path / "text.jsonl").write_text(text)
    make_tokens([str(tmp_path / "text.jsonl")], tmp_path / "set", TokenSettings(train_bpe=300, val_fraction=0.1))
    args = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3} | fields
    tree = {
        "model": {"size": size, "ffn": "qdmoa", "args": args},
        "data": {"train": str(tmp_path / "set/train"), "sequence_length": 16},
        "optim": {"algorithm": algorithm},
        "schedule": {"tokens": 1024},
    }
    file = write_config(tmp_path, tree)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train_lm(["--config", str(file)]) == 0
    config = read_config(LMConfig, file)
    workload = lm_workload(config)
    check_against_run(tmp_path / "run", config, workload, recorded_muon(tmp_path / "run"), samples=8 * 16)

    eager = {"ffn_backend": "eager", "expert_dispatch": "grouped", "vocab_size": 320}
    real = MoALlamaForCausalLM(named_config(size, "qdmoa", **args, **eager))

    def loss(tokens):
        return real(input_ids=tokens, shift_labels=tokens, skip_logits=True).loss

    found = saved_bytes_per_sample(real, loss, lambda count: torch.zeros(count, 16, dtype=torch.int64))
    # The tokens that share an expert are unknown to fake tensors.
    assert workload.saved.per_sample == pytest.approx(found, rel=0.01 if size == "moe-micro" else 0, abs=0)


def test_mask_of_documents_is_saved():
    small = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "vocab_size": 320}
    model = named_config("dense-micro", "qdmoa", **small, ffn_backend="eager")
    real = MoALlamaForCausalLM(model)

    def loss(positions):
        tokens = torch.zeros_like(positions)
        return real(input_ids=tokens, shift_labels=tokens, skip_logits=True, position_ids=positions).loss

    two_documents = torch.cat([torch.arange(10), torch.arange(14)])
    traced = saved_bytes(model, 24, bf16=False, masked=True)
    assert traced.per_sample == saved_bytes_per_sample(real, loss, lambda n: two_documents.repeat(n, 1))


@pytest.mark.parametrize(
    ("pattern", "images"),
    [
        ("{}", 6),
        ("{}/absent/*.tar", 1_281_167),
        ("http://localhost:9/a.tar", 1_281_167),
    ],
)
def test_local_images_are_counted(pattern, images, tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path / f"{name}.tar", 3)
    data = {"train": pattern.format(tmp_path), "cache_dir": str(tmp_path / "cache")}
    config = read_config(MAEConfig, write_config(tmp_path, {"model": SMALL_MAE, "data": data}))
    assert mae_workload(config).samples_per_epoch == images
    assert mae_workload(config, images=100).samples_per_epoch == 100


@pytest.mark.parametrize(("repeats", "decoded"), [(1, 1.0), (6, 1 / 2)])
def test_crops_of_a_micro_batch_share_its_decoded_images(repeats, decoded, tmp_path):
    data = {"train": "absent", "repeated_augmentation": repeats}
    workload = mae_workload(read_config(MAEConfig, write_config(tmp_path, {"model": SMALL_MAE, "data": data})))
    assert workload.loader_core_s(2) == pytest.approx((318 / 414 * decoded + 1 - 318 / 414) / 318)


# The script


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_tables_of_the_docs(number, capsys, monkeypatch):
    tables = re.findall(r"<!-- (python scripts/plan.py .*) -->\n((?:\|.*\n)+)", PAGE)
    assert len(tables) == 3
    command, shown = tables[number]
    monkeypatch.chdir(ROOT)
    assert plan.main(shlex.split(command)[2:]) == 0
    assert f"\n\n{shown}" in capsys.readouterr().out


def test_configs_are_layered_and_keys_override_them(tmp_path, capsys):
    model = write_config(tmp_path, {"model": SMALL_MAE, "data": {"train": "absent"}})
    (tmp_path / "over.yaml").write_text("schedule: {batch_size: 16}")
    words = ["--config", str(model), "--config", str(tmp_path / "over.yaml"), "--gpus", "1,2"]
    assert plan.main([*words, "--loop.micro_batch_size", "2"]) == 0
    out = capsys.readouterr().out
    assert "2 x 8" in out and "2 x 4" in out and "1,281,167 training images (--images)" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "h300"], "argument --gpu: invalid choice: 'h300'"),
        (["--gpus", "8,0"], "argument --gpus: 8,0 is not a list of numbers above 0"),
        (["--config", "epochs.yaml"], "schedule.epochs needs the number of training tokens; add --tokens N"),
    ],
)
def test_mistakes_are_reported(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lm = {"model": {"size": "dense-micro"}, "data": {"train": "absent"}}
    Path("epochs.yaml").write_text(yaml.safe_dump({**lm, "schedule": {"epochs": 2}}))
    config = [] if "--config" in options else ["--config", str(ROOT / "configs/mae/vit_b16_qdmoa_800ep.yaml")]
    try:
        code = plan.main([*config, *options])
    except SystemExit as end:
        code = end.code
    assert code == 2 and message in capsys.readouterr().err
