"""scripts/plan.py against runs that really train, torch's own counters, and the tables in docs/planning.md."""

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
from moa_lm.pretrain import main as train_lm
from moa_lm.sizes import named_config
from moa_lm.token_shards import TokenSettings, make_tokens
from moa_train.devices import saved_bytes_per_sample
from moa_vision.pretrain import ModelConfig, build_mae
from moa_vision.pretrain import main as train_mae

ROOT = Path(__file__).parents[1]
QUICK = {
    "schedule": {"batch_size": 8},
    "loop": {"micro_batch_size": 4, "log_every": 1, "num_diagnostic_samples": 0, "trackers": []},
    "checkpoint": {"interval": 2},
}
SMALL_ENCODER = {"embed_dim": 96, "depth": 2, "num_heads": 2, "patch_size": 4}


with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "scripts")
    plan = importlib.import_module("plan")


@pytest.fixture
def planned(capsys):
    """planned(file, *options) -> (workload, plan of the first number of devices) as the script prints them."""

    def planned(file, *options):
        capsys.readouterr()
        assert plan.main(["--config", str(file), "--json", "--gpu", "cpu", "--gpus", "1", *options]) == 0
        tree = json.loads(capsys.readouterr().out)
        return tree["workload"], tree["plans"][0]

    return planned


def write_config(folder, tree):
    both = {key: {**QUICK.get(key, {}), **value} for key, value in tree.items()}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({**QUICK, **both, "out": str(folder), "name": "run"} | {"name": "run"}))
    return file


def check_against_run(folder, workload, found, samples):
    """What was planned is what the run in `folder` came to."""
    summary = json.loads((folder / "summary.json").read_text())
    assert workload["parameters"] == summary["parameters"]
    assert found["plan"]["total_steps"] == summary["steps"]
    per_unit = summary.get("flops_per_sample", summary.get("flops_per_token"))
    assert workload["flops_per_sample"] / workload["units_per_sample"] == pytest.approx(per_unit, rel=1e-12)
    newest = folder / "checkpoints" / (folder / "checkpoints/LAST").read_text().strip()
    assert found["checkpoint_bytes"] == pytest.approx(sum(f.stat().st_size for f in newest.iterdir()), rel=0.01)
    assert found["kept"] == len([*(folder / "checkpoints").glob("step_*")])
    assert found["hours"] * 3600 == pytest.approx(summary["steps"] * samples / summary["throughput"])


@pytest.mark.slow
def test_a_masked_autoencoder_that_really_trains(tmp_path, planned):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 24, 24, 3), dtype=np.uint8)
    sizes = []
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for number, image in enumerate(pixels):
            buffer = BytesIO()
            Image.fromarray(image).save(buffer, "JPEG")
            info = tarfile.TarInfo(f"{number:02d}.jpg")
            info.size = len(buffer.getvalue())
            sizes.append(info.size)
            tar.addfile(info, BytesIO(buffer.getvalue()))
    model = {"encoder": "vit_tiny_patch16_qdmoa", "img_size": 16, "encoder_args": SMALL_ENCODER}
    model |= {"decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 2}
    data = {"train": str(tmp_path / "images.tar"), "workers": 0, "cache_dir": str(tmp_path / "cache")}
    file = write_config(tmp_path, {"model": model, "data": data, "schedule": {"epochs": 4}})
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train_mae(["--config", str(file)]) == 0
    workload, found = planned(file, "--measured", str(tmp_path / "run"))
    check_against_run(tmp_path / "run", workload, found, samples=8)
    assert workload["samples_per_epoch"] == 20
    assert found["reading"]["stored_bytes"] == pytest.approx(np.mean(sizes))

    torch.manual_seed(0)
    real = build_mae(ModelConfig(**model))
    for module in real.modules():
        if isinstance(module, FFN):
            module.backend = "eager"
    noise = torch.linspace(0, 1, real.num_patches)

    def batch(count):
        return torch.zeros(count, 3, 16, 16), noise.expand(count, -1)

    assert workload["saved"]["per_sample"] == saved_bytes_per_sample(real, lambda b: real(*b).loss, batch)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        real(*batch(64))
    assert 3 * counter.get_total_flops() / 64 == pytest.approx(workload["flops_per_sample"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "algorithm", "fields"),
    [("dense-micro", "adamw", {}), ("moe-micro", "muon", {"moe_intermediate_size": 48})],
    ids=["dense", "experts"],
)
def test_a_language_model_that_really_trains(size, algorithm, fields, tmp_path, planned):
    from moa_lm.modeling import MoALlamaForCausalLM

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
    workload, found = planned(file, "--measured", str(tmp_path / "run"))
    check_against_run(tmp_path / "run", workload, found, samples=8 * 16)
    assert found["reading"]["stored_bytes"] == 2 * 17

    eager = {"ffn_backend": "eager", "expert_dispatch": "grouped", "vocab_size": 320}
    real = MoALlamaForCausalLM(named_config(size, "qdmoa", **args, **eager))

    def loss(tokens):
        return real(input_ids=tokens, shift_labels=tokens, skip_logits=True).loss

    def batch(count):
        return torch.zeros(count, 16, dtype=torch.int64)

    part = 0.01 if size == "moe-micro" else 0  # which tokens share an expert, no fake tensor tells
    assert workload["saved"]["per_sample"] == pytest.approx(saved_bytes_per_sample(real, loss, batch), rel=part, abs=0)


def test_what_muon_stepped_in_a_recorded_run(tmp_path):
    tree = {"name": "run", "model": {"size": "moe-micro", "ffn": "qdmoa"}, "data": {"train": "gone"}}
    of_a_layer = 4 + 3 + 3  # attention, shared expert, routed experts
    for algorithm, found in (("adamw", 0), ("muon", 4 * of_a_layer)):
        own = {"optim": {"algorithm": algorithm}, "schedule": {"tokens": 8}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({**tree, **own}))
        shapes = plan.recorded_muon(tmp_path)
        assert len(shapes) == found and set(shapes) <= {(128, 128), (8, 128, 128)}
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"measured is .*it must be a run folder \(.*config.yaml cannot be read"):
        plan.recorded_muon(tmp_path)


def test_a_mask_of_documents_is_saved_where_there_is_one():
    from moa_lm.modeling import MoALlamaForCausalLM

    small = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "vocab_size": 320}
    model = named_config("dense-micro", "qdmoa", **small, ffn_backend="eager")
    real = MoALlamaForCausalLM(model)

    def loss(positions):
        tokens = torch.zeros_like(positions)
        return real(input_ids=tokens, shift_labels=tokens, skip_logits=True, position_ids=positions).loss

    two_documents = torch.cat([torch.arange(10), torch.arange(14)])
    traced = plan.language_saved_bytes(model, 24, bf16=False, masked=True)
    assert traced.per_sample == saved_bytes_per_sample(real, loss, lambda n: two_documents.repeat(n, 1))
    assert traced.per_sample >= plan.language_saved_bytes(model, 24, bf16=False).per_sample + 3 * 4 * 24**2


def small_model(folder, name, **tree):
    file = folder / name
    file.write_text(yaml.safe_dump(tree))
    return str(file)


def test_configurations_are_layered_as_in_training(tmp_path):
    model = small_model(
        tmp_path,
        "model.yaml",
        model={"size": "dense-micro"},
        optim={"lr": 1e-3},
        schedule={"tokens": 512},
        data={"train": "x"},
    )
    over = small_model(tmp_path, "over.yaml", schedule={"batch_size": 32}, optim={"lr": 2e-3})
    again = small_model(tmp_path, "again.yaml", optim={"lr": 3e-3})
    for words, lr in [
        (["--config", model, f"--config={over}"], 2e-3),
        (["--config", over, "--config", model], 1e-3),
        (["--config", model, "--optim.lr", "5e-3", "--config", again], 3e-3),
        (["--config", model, "--config", again, "--optim.lr=5e-3"], 5e-3),
    ]:
        files = [Path(word.removeprefix("--config=")) for word in words if word.endswith(".yaml")]
        config, is_autoencoder = plan.read_config(files, words)
        assert not is_autoencoder and config.optim.lr == lr and config.model.size == "dense-micro"


def test_layered_configurations_are_planned(tmp_path, planned):
    model = {"encoder": "vit_tiny_patch16_qdmoa", "img_size": 16, "encoder_args": SMALL_ENCODER}
    model |= {"decoder_dim": 64, "decoder_depth": 1, "decoder_heads": 2}
    first = small_model(tmp_path, "first.yaml", model=model, data={"train": "absent"})
    second = small_model(tmp_path, "second.yaml", schedule={"batch_size": 32})
    words = ["--schedule.batch_size", "16", "--config", second, "--loop.micro_batch_size", "4"]
    assert planned(first, *words)[1]["plan"]["accumulation"] == 8


@pytest.mark.parametrize("half", ["mae/vit_b16_qdmoa_800ep", "lm/dense_0.12b_20tpp_qdmoa"], ids=["vision", "language"])
def test_a_wrong_key_points_to_the_script_that_lists_them(half, capsys):
    script = {"mae": "pretrain_mae.py", "lm": "pretrain_lm.py"}[half.partition("/")[0]]
    with pytest.raises(SystemExit) as stopped:
        plan.main(["--config", str(ROOT / f"configs/{half}.yaml"), "--optim.lrr", "1"])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert "did you mean optim.lr?" in told and told.endswith(f"All keys: {script} --help\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1,", "cannot be read ("),
        ("- 1", "cannot be read (it holds a list, not keys with values)"),
        ("3: 4", "3 is a key, but no text"),
        ("model: !!bool x", "cannot be read ("),
        ("model: [1]", "one file at least must describe a model"),
        ("", "one file at least must describe a model"),
    ],
    ids=["broken", "list", "number", "tag", "model-list", "empty"],
)
def test_what_is_no_configuration(content, message, tmp_path, capsys):
    file = tmp_path / "some.yaml"
    file.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        plan.main(["--config", str(file)])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("plan.py: error: ") and told.count("\n") == 1 and str(file) in told and message in told


def commands():
    return re.findall(r"<!-- (python scripts/plan.py .*--markdown) -->\n((?:\|.*\n)+)", text())


def text():
    return (ROOT / "docs/planning.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_tables_of_the_docs(number, capsys, monkeypatch):
    assert len(commands()) == text().count("<!-- python") == 3
    command, shown = commands()[number]
    monkeypatch.chdir(ROOT)
    assert plan.main(shlex.split(command)[2:]) == 0
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "h300"], "argument --gpu: gpu is 'h300'; it must be one of b200"),
        (["--gpus", "8,none"], "argument --gpus: 'none' is not a number above 0"),
        (["--network", "-1"], "argument --network: '-1' is not a number above 0"),
        (["--disk", "inf"], "argument --disk: 'inf' is not a number above 0"),
        (["--markdown"], "--markdown prints the table of several --gpus"),
        (["--utilization", "1.5"], "utilization is 1.5; it must be above 0 and at most 1"),
        (["--measured", "absent"], "measured is 'absent'; it must be a run folder"),
        (["--config", "absent.yaml"], "absent.yaml cannot be read ("),
    ],
    ids=lambda value: value[0][2:] if isinstance(value, list) else "",
)
def test_what_cannot_be_planned(options, message, capsys):
    file = str(ROOT / "configs/mae/vit_b16_qdmoa_800ep.yaml")
    with pytest.raises(SystemExit) as stopped:
        plan.main(["--config", file, *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def refused(capsys, file, *options):
    """The one message with which nothing is planned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        plan.main(["--config", str(file), *options])
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in told
    return told


@pytest.mark.parametrize("measured", [False, True], ids=["planned", "measured"])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"num_hidden_layer": 12}, "did you mean num_hidden_layers?"),
        ({"rms_norm_eps": "x"}, "model.args {'rms_norm_eps': 'x'}: StrictDataclass"),
        ({"vocab_size": 320}, "vocab_size"),
        ({"id2label": 3}, "model.args {'id2label': 3}: "),
    ],
    ids=str,
)
def test_what_training_refuses_is_not_planned(args, message, measured, tmp_path, capsys):
    tree = {"data": {"train": "absent"}, "schedule": {"tokens": 512}, "optim": {"algorithm": "muon"}}
    good = write_config(tmp_path, {"model": {"size": "dense-micro"}, **tree})
    (tmp_path / "other").mkdir()
    bad = write_config(tmp_path / "other", {"model": {"size": "dense-micro", "args": args}, **tree})
    words = [good, "--measured", str(bad.parent)] if measured else [bad]
    told = refused(capsys, *words)
    assert message in told and told.count("\n") == 1


def test_what_is_assumed_is_said(tmp_path, planned):
    tree = {"model": {"size": "dense-micro"}, "data": {"train": "absent"}, "schedule": {"tokens": 512}}
    workload, _ = planned(write_config(tmp_path, tree), "--start_from", "other/checkpoints/step_1")
    vocabulary, begun = workload["assumed"]
    assert vocabulary.startswith("a vocabulary of 50,304 as GPT-2's") and "model.args" not in vocabulary
    assert begun == "from step 0, whatever start_from other/checkpoints/step_1 has behind it"


@pytest.fixture
def few_images(tmp_path):
    """A configuration of a small model, and a folder with two shards of three images."""
    image = BytesIO()
    Image.new("RGB", (24, 24)).save(image, "JPEG")
    for shard in "ab":
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(3):
                info = tarfile.TarInfo(f"{shard}{number}.jpg")
                info.size = len(image.getvalue())
                tar.addfile(info, BytesIO(image.getvalue()))
    model = {"encoder": "vit_tiny_patch16_qdmoa", "img_size": 16, "encoder_args": SMALL_ENCODER}
    model |= {"decoder_dim": 64, "decoder_depth": 1, "decoder_heads": 2}
    data = {"train": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
    schedule = {"batch_size": 2}
    return write_config(tmp_path, {"model": model, "data": data, "schedule": schedule, "loop": {"micro_batch_size": 2}})


@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("{}", 6),
        ("{}/*.tar", 6),
        ("{}/{{a,b}}.tar", 6),
        ("file:{}/a.tar", 3),
        ("{0}/a.tar::{0}/b.tar", 6),
        ("{}/absent-*.tar", 1_281_167),
        ("pipe:cat {}/a.tar", 1_281_167),
        ("{}/a.tar::pipe:touch {}/ran", 1_281_167),
        ("http://localhost:9/a.tar", 1_281_167),
        ("pipe:" + "x" * 300, 1_281_167),
    ],
)
def test_images_that_are_here_are_counted(name, images, few_images, tmp_path, planned):
    pattern = name.format(tmp_path, tmp_path)
    assert planned(few_images, "--data.train", pattern)[0]["samples_per_epoch"] == images
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["x" * 300, "~nobody here/x", "{}/empty", "{}/broken.tar"])
def test_images_that_cannot_be_read(name, few_images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 300)
    told = refused(capsys, few_images, "--data.train", name.format(tmp_path))
    assert told.startswith("plan.py: error: ") and told.count("\n") == 1


def test_a_folder_that_may_not_be_read(few_images, tmp_path, capsys, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied", "set")

    monkeypatch.setattr("moa_vision.index.expand", denied)  # root may read everything
    assert "which cannot be read: [Errno 13] Permission denied" in refused(capsys, few_images)


def test_tokens_in_the_home_of_nobody(tmp_path, capsys):
    tree = {"model": {"size": "dense-micro"}, "data": {"train": "~nobody here/x"}, "schedule": {"tokens": 512}}
    assert "data.train is '~nobody here/x', which cannot be read" in refused(capsys, write_config(tmp_path, tree))


def test_repeats_beyond_the_micro_batch(few_images, planned):
    """A micro-batch of two reads its image itself, whatever the next one needs."""
    _, once = planned(few_images)
    for repeats in ("2", "6"):
        found = planned(few_images, "--data.repeated_augmentation", repeats)[1]["reading"]
        assert found["stored_bytes"] == pytest.approx(once["reading"]["stored_bytes"] / 2)
        assert found["core_s"] == pytest.approx((318 / 414 / 2 + 1 - 318 / 414) / 318)


def test_epochs_of_unknown_tokens(tmp_path, capsys):
    tree = {"model": {"size": "dense-micro"}, "data": {"train": "absent"}, "schedule": {"epochs": 2}}
    file = write_config(tmp_path, tree)
    with pytest.raises(SystemExit):
        plan.main(["--config", str(file)])
    assert "schedule.epochs is 2.0; it must be null, or give --tokens N" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        plan.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "--gpus" in shown and "rtx-4090" in shown and "docs/planning.md" in shown
