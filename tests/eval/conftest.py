"""Small run folders and harness results, written from their formats alone: nothing of ours is imported."""

import hashlib
import json
import math
from functools import partial

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save_file


def default_config(name, seed, encoder, lr):
    return {
        "name": name,
        "seed": seed,
        "out": "runs",
        "resume": "auto",
        "optim": {"lr": lr, "betas": [0.9, 0.95], "weight_decay": 0.05},
        "schedule": {"epochs": 10.0, "warmup_epochs": 1.0, "min_lr": 0.0, "batch_size": 64},
        "loop": {"micro_batch_size": 64, "precision": "float32", "val_samples": None, "log_every": 1},
        "model": {
            "encoder": encoder,
            "img_size": 32,
            "encoder_args": {"embed_dim": 64, "depth": 2},
            "decoder_ffn": None,
            "mask_ratio": 0.75,
            "norm_pix_loss": True,
        },
        "data": {"train": "shards/train", "val": "shards/val", "workers": 2, "mean": [0.5, 0.5, 0.5]},
    }


def language_config(name, seed, ffn, lr):
    config = default_config(name, seed, ffn, lr)
    first = {key: config[key] for key in ("name", "seed", "out", "resume")} | {"start_from": None}
    return first | config | {
        "model": {"ffn": ffn, "size": "dense-0.12b", "args": {}, "gradient_checkpointing": False},
        "data": {"train": "text/train", "val": "text/val", "sequence_length": 64, "document_mask": False},
        "schedule": {
            "tokens": None, "tokens_per_parameter": 20, "epochs": None, "warmup_steps": 4, "batch_size": 1,
            "min_lr": 0.0, "decay_fraction": 1.0, "decay_type": "cosine",
        },
    }  # fmt: skip


def curve(steps, final, seed, name):
    """A falling loss that ends at `final` but for a little noise."""
    noise = np.random.default_rng([seed, *name.encode()]).normal(0, 0.002, steps)
    return final + 0.6 * np.exp(-6 * np.arange(1, steps + 1) / steps) + noise


def write_run(
    root, name="baseline", *, encoder="vit_tiny_patch4_swiglu", lr=3e-4, seed=0, final=0.5, steps=40, nan_from=None,
    status="finished", mixing=0, keys=("images/b", "images/a"), tile_size=16, changes=None, ffn=None, spread=None,
    probes=None, experts=None,
):  # fmt: skip
    """Write a run folder and return its path; `changes` are dotted configuration keys.

    With `ffn` it is a language model's. `spread` is the standard deviation over tokens of the coefficients that it
    records; `probes` maps measurements to accuracies. `experts` are the shares of the
    assignments that each layer's experts get.
    """
    folder = root / name
    folder.mkdir(parents=True)
    config = language_config(name, seed, ffn, lr) if ffn else default_config(name, seed, encoder, lr)
    for key, value in (changes or {}).items():
        *path, last = key.split(".")
        node = config
        for part in path:
            node = node[part]
        node[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    command = f"python pretrain_mae.py --name {name} --x '<&>'"
    environment = {"device": "cpu", "cpu": "a processor", "git_commit": "0123abc", "command": command}
    (folder / "env.json").write_text(json.dumps(environment))
    rows = _rows(curve(steps, final, seed, name), nan_from, language=ffn is not None)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if ffn is None:
        _write_reconstructions(folder / "reconstructions", keys, seed=seed, size=tile_size)
    if spread is not None:
        write_mixing(folder / "mixing", keys, spread, part="model" if ffn else "encoder")
    for probe, accuracy in (probes or {}).items():
        _write_probe(folder / "probe" / f"{probe}.json", probe, accuracy)
    if status is not None:
        (folder / "summary.json").write_text(json.dumps(_summary(rows, status, mixing)))
    if experts is not None:
        write_experts(folder / "experts", experts)
    return folder


def write_experts(folder, layers):
    """Two records; `layers` are the loads of every layer's experts at the later one, even ones come before."""
    folder.mkdir(parents=True)
    for step in (20, 40):
        rows = []
        for index, final in enumerate(layers):
            load = np.full(len(final), 1 / len(final)) if step == 20 else np.asarray(final)
            rows.append(
                {
                    "layer": f"model.{index}", "load": load.tolist(), "entropy": math.log(len(load)) * 20 / step,
                    "max_entropy": math.log(len(load)), "balance_loss": float(len(load) * load @ load),
                    "assignments": 4000, "dropped": 0,
                }
            )  # fmt: skip
        (folder / f"step_{step:08d}.json").write_text(json.dumps({"step": step, "layers": rows}))


def write_mixing(folder, keys, spread, *, part="encoder", terms=("g·id", "s·id", "r2·id"), adaptive=True):
    """Two layers of `terms` on a grid of 2 x 2 patches; of layer 1 the first term never varies."""
    folder.mkdir(parents=True)
    layers = [f"{part}.0", f"{part}.1"]
    for step in (20, 40):
        rows = []
        for index, layer in enumerate(layers):
            std = [spread * step / 40] * len(terms)
            if index == 1:
                std[0] = 0.0
            rows.append(
                {
                    "layer": layer, "coefficients": terms, "token_adaptive": adaptive, "mean": [0.5] * len(terms),
                    "std": std, "low": [0.5 - spread] * len(terms), "high": [0.5 + spread] * len(terms),
                    "share": [0.5, *[0.5 / (len(terms) - 1)] * (len(terms) - 1)],
                }
            )  # fmt: skip
        (folder / f"step_{step:08d}.json").write_text(json.dumps({"step": step, "layers": rows}))
    if part == "model":
        return
    shares = np.random.default_rng(0).dirichlet(np.ones(len(terms)), (len(keys), len(layers), 4)).astype(np.float16)
    save_file({f"{part}.shares": shares, f"{part}.coefficients": shares}, folder / "maps.safetensors")
    parts = {part: {"layers": layers, "coefficients": terms}}
    index = {"step": 40, "grid": [2, 2], "keys": list(keys), "parts": parts}
    (folder / "index.json").write_text(json.dumps(index))


def _write_probe(path, name, accuracy):
    content = {
        "method": name.split("-")[0], "accuracy": accuracy, "top5": None, "train": "shards/train",
        "val": "shards/val", "train_samples": 500, "val_samples": 100, "settings": {"k": 20}, "step": 40,
    }  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def make_run(tmp_path):
    """`write_run` into a folder of the test's own."""
    return partial(write_run, tmp_path / "runs")


@pytest.fixture
def no_figures(monkeypatch):
    """Sections without charts, for tests of everything else: drawing is most of the time."""
    monkeypatch.setattr("moa_eval.training.figures.draw_all", lambda comparison: {})
    monkeypatch.setattr("moa_eval.zero_shot.report.draw", lambda comparison: {})


@pytest.fixture(scope="session")
def write_run_into():
    """`write_run` itself, for fixtures that outlive one test."""
    return write_run


HARNESS_TASKS = {
    "arc_challenge": ("acc", "acc_norm"), "hellaswag": ("acc", "acc_norm"),
    "openbookqa": ("acc", "acc_norm"), "winogrande": ("acc",),
}  # fmt: skip


def write_results(
    root, model="models/base", *, seed=0, skill=0.5, items=40, tasks=HARNESS_TASKS, shots=0, limit=None,
    date="2026-11-21T10-11-12.345678", log_samples=True,
):  # fmt: skip
    """Write results as `lm_eval --output_path root --log_samples` (0.4.13) does; return the results file.

    `tasks` maps a task to its metrics. Each metric is 1 for a share `skill` of the items and 0 for the others. Equal
    seeds give equal answers, up to the items that a different skill changes.
    """
    folder = root / model.replace("/", "__")
    folder.mkdir(parents=True, exist_ok=True)
    results, samples = {}, {}
    for position, (task, metrics) in enumerate(tasks.items()):
        generator = np.random.default_rng([seed, position])
        draws = {metric: generator.random(items) for metric in metrics}
        answers = {metric: (draw < skill).astype(float) for metric, draw in draws.items()}
        samples[task] = [
            _sample(task, index, shots, {metric: float(own[index]) for metric, own in answers.items()})
            for index in range(items)
        ]
        results[task] = {"alias": task, "name": task, "sample_len": items}
        for metric, own in answers.items():
            results[task][f"{metric},none"] = float(own.mean())
            results[task][f"{metric}_stderr,none"] = float(own.std(ddof=1) / math.sqrt(items))
    content = {
        "results": results,
        "group_subtasks": {},
        "configs": {
            task: {
                "task": task, "dataset_path": f"local/{task}", "num_fewshot": shots, "output_type": "multiple_choice",
                "metric_list": [{"metric": metric, "aggregation": "mean"} for metric in metrics],
                "metadata": {"version": 1.0, "pretrained": model},
            }
            for task, metrics in tasks.items()
        },
        "versions": dict.fromkeys(tasks, 1.0),
        "n-shot": dict.fromkeys(tasks, shots),
        "n-samples": {task: {"original": 1000, "effective": items} for task in tasks},
        "config": {
            "model": "moa", "model_args": {"pretrained": model, "dtype": "bfloat16"}, "model_dtype": "torch.bfloat16",
            "model_num_parameters": 123_456_789, "batch_size": "64", "device": None, "limit": limit,
        },
        "git_hash": "0123abc", "date": 1795255872.0, "lm_eval_version": "0.4.13", "transformers_version": "5.23.0",
        "pretty_env_info": "PyTorch version: 2.15.0\nGPU 0: an accelerator", "max_length": 2048,
        "model_source": "moa", "model_name": model, "total_evaluation_time_seconds": "250.1",
    }  # fmt: skip
    file = folder / f"results_{date}.json"
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False))
    for task, own in samples.items() if log_samples else ():
        lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in own)
        (folder / f"samples_{task}_{date}.jsonl").write_text(lines)
    return file


def _sample(task, index, shots, metrics):
    doc = {"query": f"{task} \u2028 question {index}", "gold": index % 4}
    contexts = [f"{shots} examples. {doc['query']}"] * 4
    digests = {
        "doc_hash": json.dumps(doc, indent=2, ensure_ascii=False),
        "prompt_hash": contexts[0],
        "target_hash": str(doc["gold"]),
    }
    return {
        "doc_id": index, "doc": doc, "target": str(doc["gold"]),
        "arguments": {f"gen_args_{i}": {"arg_0": c, "arg_1": f" answer {i}"} for i, c in enumerate(contexts)},
        "resps": [[["-1.5", "False"]]] * 4, "filtered_resps": [["-1.5", "False"]] * 4, "filter": "none",
        "metrics": list(metrics), **{key: hashlib.sha256(text.encode()).hexdigest() for key, text in digests.items()},
        **metrics,
    }  # fmt: skip


@pytest.fixture(scope="session", name="write_results")
def write_results_fixture():
    """The function `write_results`."""
    return write_results


def _rows(losses, nan_from, language=False):
    steps = len(losses)
    rows = []
    for step, loss in enumerate(losses.tolist(), start=1):
        loss = math.nan if nan_from is not None and step >= nan_from else loss
        where = {"step": step, "epoch": 10 * step / steps, "tokens" if language else "samples": 64 * step}
        speed = {"lr": 1e-4, "grad_norm": 1.0, "throughput": 100.0 + step, "mfu": None}
        rows.append({"kind": "train", **where, "loss": loss, **speed, "wall_s": 0.5 * step})
        if step % 10 == 0:
            spaces = {} if language else {"loss_norm": loss + 0.01, "loss_pixel": 0.3 * loss}
            values = {"loss": loss + 0.01, **spaces}
            rows.append({"kind": "val", **where, **values, "wall_s": 0.5 * step})
    return rows


def _summary(rows, status, mixing):
    counter = "tokens" if "tokens" in rows[-1] else "samples"
    return {
        "status": status,
        "parameters": {"total": 1_000_000 + mixing, "mixing": mixing},
        f"flops_per_{counter[:-1]}": 3_000_000 + 10 * mixing,
        "throughput": 120.0,
        "peak_memory_mib": 512.0,
    }


def _write_reconstructions(folder, keys, *, seed, size):
    folder.mkdir()
    index = []
    for position, key in enumerate(keys):
        pixels = np.random.default_rng(list(key.encode())).integers(0, 256, (size, size, 3), dtype=np.uint8)
        masked = pixels.copy()
        masked[: size // 2] = 128
        rebuilt = pixels.copy()
        rebuilt[: size // 2] = (seed * 40) % 256
        entry = {"key": key, "loss_norm": 0.5 + 0.1 * position, "loss_pixel": 0.25 + 0.1 * position}
        for tile, image in (("original", pixels), ("masked", masked), ("reconstruction", rebuilt)):
            entry[tile] = f"{position:02d}_{tile}.png"
            Image.fromarray(image).save(folder / entry[tile])
        index.append(entry)
    (folder / "index.json").write_text(json.dumps({"step": 40, "images": index}))
