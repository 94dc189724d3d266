"""Regression tests: commands, models and reports reproduce the numbers in tests/golden/.

`python tests/test_golden.py` rewrites the expected numbers after an intended change. It keeps the inputs: run
folders, harness results and the tokenizer.
"""

import contextlib
import csv
import io
import json
import math
import os
import re
import runpy
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from moa_train.config import RENAMED_KEYS

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).with_name("golden")

# Key or column in the golden files -> its current name, or None if it was removed.
RENAMED: dict[str, str | None] = {
    **RENAMED_KEYS,
    "ffn_gate": "ffn_mixing_gate",
    "contender": "method",
    "method": "probe_method",
}
# Config file in recipes.json -> arguments that give this recipe now, e.g. ["--config", "configs/lm/base.yaml", ...].
MOVED: dict[str, list[str]] = {}
NEW_KEYS = {"model.init_from": None, "evaluators": {}}
for size in ("0.12b_20tpp", "0.25b_20tpp", "0.12b_100tpp"):
    rates = {"swiglu": "2e-3", "onemoa": "3e-3", "bimoa": "3e-3", "qdmoa": "3e-3"}
    if size == "0.12b_100tpp":
        rates = {"swiglu": "4e-3", "onemoa": "5e-3", "bimoa": "6e-3", "qdmoa": "5e-3"}
    for ffn, lr in rates.items():
        words = ["--model.ffn", ffn, "--optim.lr", lr, "--name", f"dense_{size}_{ffn}"]
        MOVED[f"configs/lm/dense_{size}_{ffn}.yaml"] = ["--config", f"configs/lm/dense_{size}.yaml", *words]
for size in ("0.25b", "0.5b", "1b", "2b"):
    for ffn in ("swiglu", "onemoa", "qdmoa"):
        words = ["--model.ffn", ffn, "--name", f"moe_{size}_{ffn}"]
        MOVED[f"configs/lm/moe_{size}_{ffn}.yaml"] = ["--config", f"configs/lm/moe_{size}.yaml", *words]
for file in ("lm/dense_0.12b_20tpp_qdmoa", "lm/moe_2b_qdmoa"):  # these two still exist
    del MOVED[f"configs/{file}.yaml"]
for old, new, *words in (
    ("lm/dense_0.12b_ablation", "lm/dense_0.12b_20tpp"),
    ("mae/cifar10_micro_swiglu", "mae/cifar10_micro"),
    ("mae/cifar10_micro_swiglu_wide", "mae/cifar10_micro", "--model.encoder_args.mlp_ratio", "6"),
    ("mae/cifar10_micro_qdmoa", "mae/cifar10_micro", "--model.encoder", "vit_tiny_patch16_qdmoa"),
    ("mae/cifar10_vit_t_swiglu", "mae/cifar10_vit_t"),
    ("mae/cifar10_vit_t_qdmoa", "mae/cifar10_vit_t", "--model.encoder", "vit_tiny_patch16_qdmoa"),
    ("mae/imagenet_sample_micro_swiglu", "mae/imagenet_sample_micro"),
    ("mae/imagenet_sample_micro_qdmoa", "mae/imagenet_sample_micro", "--model.encoder", "vit_tiny_patch16_qdmoa"),
    ("mae/vit_s16_swiglu_1gpu", "mae/vit_s16_1gpu"),
    ("mae/vit_s16_qdmoa_1gpu", "mae/vit_s16_1gpu", "--model.encoder", "vit_small_patch16_qdmoa", "--optim.lr", "6e-4"),
):
    MOVED[f"configs/{old}.yaml"] = ["--config", f"configs/{new}.yaml", *words, "--name", Path(old).name]

SHORT = [
    "--loop.val_every",
    "2",
    "--loop.val_samples",
    "16",
    "--loop.num_diagnostic_samples",
    "0",
    "--loop.trackers",
    "[]",
]
DEMOS = {
    "mae": ("laptop", ["--schedule.epochs", "0.4", "--schedule.warmup_epochs", "0.134"]),  # 6 steps, 2 of warm-up
    "lm": ("tales", ["--schedule.epochs", "null", "--schedule.tokens", "16384", "--schedule.warmup_steps", "2"]),
}
COLUMNS = {"kind", "step", "epoch", "samples", "tokens", "loss", "loss_norm", "loss_pixel", "lr", "grad_norm"}
VERSIONS = {"transformers_version", "_name_or_path"}
NOISE = "qkv.bias"  # the gradient of a key's bias is rounding error, which AdamW scales up

REPORTS = {
    "compare_runs": ["vision", "--section", "Language", "language", "--baseline", "swiglu"],
    "compare_evals": ["models__swiglu", "models__qdmoa"],
}
ENVIRONMENT = {"environment.csv", "packages.csv"}

CONTEXTS = ["", "A man is sitting on a roof. He", "The plant needs light, because"]
CONTINUATIONS = [
    " starts pulling up roofing.",
    " starts",
    " wraps a pair of skis.",
    " hace.",
    "Tre",
]  # two are greedy

VARIANTS = ("relu2", "gelu", "la", "moa", "swiglu", "onela", "bila", "qdla", "onemoa", "bimoa", "qdmoa")
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{variant: (variant, {}) for variant in VARIANTS},
    "onemoa, up": ("onemoa", {"mixed_branch": "up"}),
    "bimoa, softmax": ("bimoa", {"mixing_gate": "softmax"}),
    "qdmoa, softmax": ("qdmoa", {"mixing_gate": "softmax"}),
    "qdmoa, tanh, biases": ("qdmoa", {"mixing_gate": "tanh", "bias": True, "mix_bias": True}),
    "qdmoa, dictionaries": ("qdmoa", {"gate_activations": "silu,tanh", "up_activations": "identity,gelu,relu2"}),
}


def run_script(name: str, *arguments: str | Path, folder: Path) -> str:
    """Run scripts/NAME.py from `folder`, in this process; return what it printed."""
    words = [str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]
    printed = io.StringIO()
    with contextlib.chdir(folder), patch.object(sys, "argv", words), contextlib.redirect_stdout(printed):
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            assert not end.code, f"{' '.join(words)} ended with code {end.code}"
    return printed.getvalue()


def moments(tensor: torch.Tensor) -> dict[str, float]:
    """Return mean, standard deviation and a position-weighted mean, which permutations change."""
    values = tensor.detach().double().flatten()
    ramp = values @ torch.linspace(-1, 1, len(values), dtype=torch.float64) / len(values)
    return {"mean": values.mean().item(), "std": values.std(correction=0).item(), "ramp": ramp.item()}


def training(task: str, folder: Path) -> dict[str, Any]:
    """Train the two demo runs of a task, shortened; return their losses and exports."""
    family, shortened = DEMOS[task]
    if task == "mae":
        from moa_vision.photographs import make_photograph_shards

        make_photograph_shards(folder / "data/photographs")
    else:
        from moa_lm.__main__ import main

        assert main(["tales", "--out", str(folder / "data/tales")]) == 0
    found = {}
    for ffn in ("swiglu", "qdmoa"):
        config = ROOT / "configs" / task / f"{family}_{ffn}.yaml"
        options = [*shortened, *SHORT, "--data.workers", "0"]
        run_script(f"pretrain_{task}", "--config", config, *options, folder=folder)
        run = folder / "runs" / f"{family}_{ffn}"
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        kept = [{key: value for key, value in row.items() if key in COLUMNS} for row in rows]
        found[ffn] = {"metrics": kept, "export": export(task, run / "export")}
    return found


@torch.inference_mode()
def export(task: str, folder: Path) -> dict[str, Any]:
    """Summarize config, tensors and output of an exported model."""
    if task == "mae":
        import timm

        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        output = model(torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32))
    else:
        from transformers import AutoModelForCausalLM

        output = AutoModelForCausalLM.from_pretrained(folder).eval()(torch.arange(60).reshape(2, 30) * 7).logits
    tensors = {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype)}
        | ({} if name.endswith(NOISE) else moments(tensor))
        for name, tensor in sorted(load_file(folder / "model.safetensors").items())
    }
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in VERSIONS}
    return {"config": config, "tensors": tensors, "output": {"shape": list(output.shape)} | moments(output)}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def recipe(file: str) -> dict[str, Any]:
    """Return all values of a resolved config by dotted key."""
    task = Path(file).parent.name
    arguments = MOVED.get(file, ["--config", file])
    found = flat(yaml.safe_load(run_script(f"pretrain_{task}", *arguments, "--print_config", folder=ROOT)))
    return {key: value for key, value in found.items() if key not in NEW_KEYS or value != NEW_KEYS[key]}


def report(name: str, out: Path) -> Path:
    """Write the report of the committed inputs to `out`, without rendering its charts."""
    rendered = {
        "vegalite_to_png": b"",
        "javascript_bundle": "",
    }
    with patch.multiple("vl_convert", **{name: Mock(return_value=value) for name, value in rendered.items()}):
        run_script(name, *REPORTS[name], "--out", out, folder=GOLDEN / name)
    return out


def compared_files(folder: Path) -> list[Path]:
    """List a report's summary and tables, except those of the environment."""
    tables = sorted(file for file in (folder / "tables").rglob("*.csv") if file.name not in ENVIRONMENT)
    return [file.relative_to(folder) for file in (folder / "summary.md", *tables)]


def numbers(summary: str) -> tuple[list[list[str]], set[str]]:
    """Return the numbers in a summary's tables, row by row, and in its sentences."""
    lines = [(line[:1], re.findall(r"[−+]?\d+(?:\.\d+)?(?:e[+-]?\d+)?", line)) for line in summary.splitlines()]
    return [row for first, row in lines if first == "|"], {x for first, row in lines if first != "|" for x in row}


def scores(folder: Path) -> list[list[Any]]:
    """Score requests by lm-eval's model `moa`, on a model made by `python -m moa_lm create`."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from moa_lm.__main__ import main

    fields = [word for field in ("initializer_range=0.2", "num_hidden_layers=2") for word in ("--set", field)]
    made = ["--tokenizer", str(GOLDEN / "tokenizer"), "--out", str(folder / "model"), "--seed", "3"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["create", "--size", "dense-micro", "--ffn", "qdmoa", *fields, *made]) == 0
    lm: Any = get_model("moa")(pretrained=str(folder / "model"), device="cpu", dtype="float32")
    pairs = [(context, continuation) for context in CONTEXTS for continuation in CONTINUATIONS]
    asked = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]
    found = lm.loglikelihood(asked, disable_tqdm=True)
    return [[*pair, *score] for pair, score in zip(pairs, found, strict=True)]


def layer(name: str, backend: str) -> dict[str, Any]:
    """Summarize output and gradients of one FFN in float64."""
    from moa_ffn import FFN

    variant, settings = LAYERS[name]
    random = np.random.RandomState(0)  # the same numbers in every version, unlike torch's
    ffn = FFN(8, 12, variant, backend=backend, **settings).double()
    for parameter in ffn.parameters():
        parameter.data = torch.from_numpy(0.3 * random.standard_normal(parameter.shape))
    x = torch.from_numpy(random.standard_normal((2, 5, 8))).requires_grad_()
    output = ffn(x)
    (output * torch.linspace(-1, 2, output.numel(), dtype=torch.float64).view_as(output)).sum().backward()
    gradients = {key: moments(parameter.grad) for key, parameter in ffn.named_parameters()}
    return {"output": moments(output), "input": moments(x.grad), **gradients}


def assert_same(now: Any, golden: Any, rtol: float, where: str, scale: float = 0.0) -> None:
    """Compare two trees: numbers within `rtol`, `moments` within `rtol` of the tensor's root mean square."""
    if isinstance(golden, dict):
        names = {key: RENAMED.get(key, key) for key in golden}
        assert set(now) == {*names.values()} - {None}, where
        size = math.hypot(golden["mean"], golden["std"]) if "ramp" in golden else 0.0
        for key, name in names.items():
            if name is not None:
                assert_same(now[name], golden[key], rtol, f"{where}, {key}", size)
    elif isinstance(golden, list):
        assert len(now) == len(golden), where
        for index, (own, kept) in enumerate(zip(now, golden, strict=True)):
            assert_same(own, kept, rtol, f"{where}, {index}")
    else:
        close = (type(now), now) == (type(golden), golden)
        with contextlib.suppress(TypeError, ValueError):  # cells of tables are text
            close = close or math.isclose(float(now), float(golden), rel_tol=rtol, abs_tol=rtol * scale)
        assert close, f"{where}: {now!r}, not {golden!r}"


def golden(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("task", DEMOS)
def test_training(task, tmp_path):
    assert_same(training(task, tmp_path), golden(f"training_{task}"), 1e-5, task)


@pytest.mark.parametrize("file", golden("recipes"))
def test_recipe(file):
    assert_same(recipe(file), golden("recipes")[file], 0.0, file)


@pytest.mark.parametrize("name", REPORTS)
def test_report(name, tmp_path):
    now, then = report(name, tmp_path / "page"), GOLDEN / name / "expected"
    assert compared_files(now) == compared_files(then)
    for file in compared_files(then):
        texts = [(folder / file).read_text() for folder in (now, then)]
        if file.suffix == ".csv":
            assert_same(*(list(csv.DictReader(text.splitlines())) for text in texts), 1e-9, str(file))
        else:
            assert numbers(texts[0]) == numbers(texts[1])


def test_scores(tmp_path):
    assert_same(scores(tmp_path), golden("scores"), 1e-4, "scores")


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, backend):
    assert_same(layer(name, backend), golden("layers")[name], 1e-9, name)


def main() -> None:
    """Rewrite all expected numbers."""
    os.environ["MOA_FFN_COMPILE"] = "0"  # as in the tests
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        trees = {f"training_{task}": training(task, Path(folder)) for task in DEMOS}
        trees |= {"recipes": {file: recipe(file) for file in golden("recipes")}, "scores": scores(Path(folder))}
        trees |= {"layers": {name: layer(name, "eager") for name in LAYERS}}
        for name, tree in trees.items():
            (GOLDEN / f"{name}.json").write_text(json.dumps(tree, indent=1) + "\n")
        for name in REPORTS:
            page, expected = report(name, Path(folder) / name), GOLDEN / name / "expected"
            shutil.rmtree(expected, ignore_errors=True)
            for file in compared_files(page):
                (expected / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(page / file, expected / file)


if __name__ == "__main__":
    main()
