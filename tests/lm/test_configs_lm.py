"""configs/lm: valid configs and headers, twins, and the numbers of the paper."""

import re
from pathlib import Path

import pytest
import torch

from moa_lm.flops import forward_flops
from moa_lm.groups import hidden_matrices
from moa_lm.modeling import MoALlamaForCausalLM
from moa_lm.pretrain import LMConfig, budgeted
from moa_lm.sizes import count_parameters, named_config
from moa_train.config import as_tree, flatten, parse_config
from moa_train.devices import bf16_peak_flops
from moa_train.muon import orthogonalize_flops
from moa_train.plan import ASSUMED_UTILIZATION

CONFIGS = sorted((Path(__file__).parents[2] / "configs/lm").glob("*.yaml"))
NAMES = {path.stem for path in CONFIGS}
RATES = {
    "dense_0.12b_20tpp": {"swiglu": 2e-3, "onemoa": 3e-3, "bimoa": 3e-3, "qdmoa": 3e-3},
    "dense_0.25b_20tpp": {"swiglu": 2e-3, "onemoa": 3e-3, "bimoa": 3e-3, "qdmoa": 3e-3},
    "dense_0.12b_100tpp": {"swiglu": 4e-3, "onemoa": 5e-3, "bimoa": 6e-3, "qdmoa": 5e-3},
}
"""Best peak learning rates of the paper, arXiv:2605.26647."""


def resolved(name):
    path = CONFIGS[0].with_name(f"{name}.yaml")
    return parse_config(LMConfig, [f"--config={path}"], program="pretrain_lm.py", summary="")


def twins():
    """Pairs of a MoA config and the name of its experiment, which has a SwiGLU baseline."""
    bases = {name.removesuffix("_swiglu") for name in NAMES if name.endswith("_swiglu")}
    return sorted(
        (name, base) for base in bases for name in NAMES if re.fullmatch(rf"{base}_(onemoa|bimoa|qdmoa)", name)
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_and_header_are_valid(path):
    config = resolved(path.stem)
    assert config.name == path.stem
    header = path.read_text().partition("\nname:")[0]
    assert all(line.startswith("#") and len(line) < 130 for line in header.splitlines())
    for word in ("Command", "Time", "Result", "Source", f"--config configs/lm/{path.name}"):
        assert word in header
    assert "TIME" not in header and "RESULT" not in header
    for source in re.findall(r"hf:\S+", header):
        assert re.fullmatch(r"hf:[\w-]+/[\w-]+(:config=[\w-]+)?", source)
    for folder in re.findall(r"--out (data/\w+)", header):
        assert config.data.train == f"{folder}/train" and config.data.val == f"{folder}/val"
    for twin in re.findall(r"# Twin +(\S+)", header):
        assert twin.removesuffix(".yaml") in NAMES
    named_config(config.model.size, config.model.ffn, **config.model.args)


@pytest.mark.slow
def test_max_tokens_of_the_data_command_covers_the_recipes():
    """Recipes with the same data give the same command, which makes little more tokens than the longest run needs."""
    needed = {}
    for path in CONFIGS:
        header = path.read_text().partition("\nname:")[0]
        found = re.search(
            r"(make_tokens\.py --source hf:[^(]*?--val-fraction (\S+) --max-tokens (\S+) --out \S+)", header
        )
        assert (found is None) == ("hf:" not in header), path
        if found is None:
            continue
        config = resolved(path.stem)
        length, batch = config.data.sequence_length, config.schedule.batch_size
        model = named_config(config.model.size, config.model.ffn)
        steps = config.schedule.budget(1, batch * length, budgeted(model, config.model.size)).total_steps
        limit = int(found[3])
        assert (limit - 1) // length // batch >= steps  # one epoch
        assert limit * float(found[2]) > 1.4 * config.loop.val_samples * length
        assert f"this one sees {steps * batch * length / 1e9:.2f}e9 tokens)" in header
        needed.setdefault(config.data.train, {}).setdefault(found[1], []).append(steps * batch * length / limit)
    assert len(needed) == 2 and all(len(commands) == 1 for commands in needed.values())
    assert all(max(parts) > 0.98 for commands in needed.values() for parts in commands.values())


@pytest.mark.parametrize(("name", "base"), twins())
def test_twins_differ_only_in_name_ffn_and_learning_rate(name, base):
    ours, theirs = resolved(name), resolved(f"{base}_swiglu")
    left, right = flatten(as_tree(ours)), flatten(as_tree(theirs))
    assert {key for key in left | right if left.get(key) != right.get(key)} <= {"name", "model.ffn", "optim.lr"}
    assert ours.model.ffn == name.rpartition("_")[2] and theirs.model.ffn == "swiglu"
    counts = [count_parameters(named_config(config.model.size, config.model.ffn)) for config in (ours, theirs)]
    assert counts[0].total - counts[0].mixing == counts[1].total and counts[0].mixing > 0 == counts[1].mixing


@pytest.mark.parametrize("experiment", sorted(RATES))
def test_learning_rates_and_budgets_of_the_paper(experiment):
    for ffn, rate in RATES[experiment].items():
        config = resolved(f"{experiment}_{ffn}")
        assert config.optim.lr == rate
        assert config.schedule.tokens_per_parameter == float(experiment.split("_")[2].removesuffix("tpp"))
        assert config.model.size == "dense-" + experiment.split("_")[1]


@pytest.mark.parametrize("size", ["0.25b", "0.5b", "1b", "2b"])
def test_experts_of_the_paper(size):
    for ffn in ("swiglu", "onemoa", "qdmoa"):
        config = resolved(f"moe_{size}_{ffn}")
        model = named_config(config.model.size, config.model.ffn)
        assert (model.num_experts, model.num_experts_per_tok, model.num_shared_experts) == (32, 4, 1)
        assert config.optim.algorithm == "muon" and 0 < config.schedule.decay_fraction < 1
        assert config.optim.lr == resolved(f"moe_{size}_swiglu").optim.lr


def test_llama_large_gets_the_tokens_of_dense():
    control, base = resolved("llama_large_20tpp"), resolved("dense_0.12b_20tpp_swiglu")
    wide, narrow = named_config("llama-large", "swiglu"), named_config("dense-0.12b", "swiglu")
    assert wide.intermediate_size == narrow.intermediate_size + 2, "as its header says"
    assert budgeted(wide, "llama-large") == budgeted(narrow, "dense-0.12b")
    left, right = flatten(as_tree(control)), flatten(as_tree(base))
    different = {key for key in left | right if left.get(key) != right.get(key)}
    assert different == {"name", "model.size"}
    assert resolved("dense_0.12b_ablation").schedule == base.schedule


def muon_flops(model):
    """FLOPs of Muon per step and device under DDP."""
    with torch.device("meta"):
        whole = MoALlamaForCausalLM(model)
    return sum(orthogonalize_flops(whole.get_parameter(name).shape) for name in hidden_matrices(whole))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_cost_in_the_header(path):
    """Steps, FLOPs per token and in total as the trainer plans them; hours at plan.py's assumed utilization."""
    text = path.read_text()
    stated = re.search(r"([\d,]+) steps x ([\d,]+) tokens x\n# +([\d.]+) GFLOPs = ([\d.e+]+) FLOPs", text)
    if stated is None:
        assert "fineweb" not in text
        return
    config = resolved(path.stem)
    model = named_config(config.model.size, config.model.ffn)
    tokens_per_step = config.schedule.batch_size * config.data.sequence_length
    steps = config.schedule.budget(1, tokens_per_step, budgeted(model, config.model.size)).total_steps
    flops = 3 * forward_flops(model, config.data.sequence_length) / config.data.sequence_length
    assert int(stated[1].replace(",", "")) == steps and int(stated[2].replace(",", "")) == tokens_per_step
    assert float(stated[3]) == pytest.approx(flops / 1e9, rel=0.006)
    assert float(stated[4]) == pytest.approx(steps * tokens_per_step * flops, rel=0.05)
    by_muon = re.findall(r", and ([\d.]+) TFLOPs a step for Muon on each:", text)
    muon = muon_flops(model) if config.optim.algorithm == "muon" else 0
    assert by_muon == ([f"{muon / 1e12:.3g}"] if muon else [])
    seconds = steps * (tokens_per_step * flops / 8 + muon) / (ASSUMED_UTILIZATION * bf16_peak_flops("H200"))
    ((time, unit),) = re.findall(r": ([\d.]+) (minutes|hours) of 8 H200", text)
    assert time == f"{seconds / {'minutes': 60, 'hours': 3600}[unit]:.{1 if '.' in time else 0}f}"
