"""configs/: every file resolves, names itself and states its cost; `base` files; the paper's settings."""

import re
from pathlib import Path

import pytest
import torch

from moa_lm.flops import forward_flops
from moa_lm.groups import hidden_matrices
from moa_lm.modeling import MoALlamaForCausalLM
from moa_lm.pretrain import LMConfig, budgeted
from moa_lm.sizes import named_config
from moa_train.config import parse_config, read_config
from moa_train.devices import bf16_peak_flops
from moa_train.errors import ConfigError
from moa_train.muon import orthogonalize_flops
from moa_train.plan import ASSUMED_UTILIZATION
from moa_vision.pretrain import MAEConfig
from moa_vision.probe.config import PLAIN_ARGUMENTS, ProbeConfig

ROOT = Path(__file__).parent.parent
KINDS = {"lm": LMConfig, "mae": MAEConfig, "probe": ProbeConfig}
FILES = [
    file.relative_to(ROOT / "configs").with_suffix("").as_posix()
    for folder in KINDS
    for file in sorted((ROOT / "configs" / folder).rglob("*.yaml"))
]
LM_FILES = [name for name in FILES if name.startswith("lm/")]


def text_of(name):
    return (ROOT / f"configs/{name}.yaml").read_text()


def resolve(name):
    folder = name.partition("/")[0]
    plain, words = (PLAIN_ARGUMENTS, ["RUN"]) if folder == "probe" else ({}, [])
    words = [*words, f"--config={ROOT}/configs/{name}.yaml"]
    return parse_config(KINDS[folder], words, program="", summary="", plain=plain)


@pytest.mark.parametrize("name", FILES)
def test_header_and_name(name):
    config = resolve(name)
    header = "".join(line for line in text_of(name).splitlines(keepends=True) if line.startswith("#"))
    assert f"--config configs/{name}.yaml" in header
    for field in ("Cost", "Result", "Source"):
        assert field in header
    if not name.startswith("probe/"):
        assert config.name == Path(name).name
    for other in re.findall(r"\b([\w.]+)\.yaml", header):
        assert any(file.endswith(f"/{other}") for file in FILES), other


def test_base_files_are_merged_key_by_key(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.yaml").write_text("name: a\nmodel: {size: small, args: {x: 1, y: 2}}\noptim: {lr: 1e-3}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nname: b\nmodel: {args: {y: 3}}\n")
    (tmp_path / "c.yaml").write_text("optim: {lr: 2e-3}\n")
    (tmp_path / "sub/d.yaml").write_text("base: [../b.yaml, ../c.yaml]\nname: d\n")
    merged = {"name": "d", "model": {"size": "small", "args": {"x": 1, "y": 3}}, "optim": {"lr": "2e-3"}}
    assert read_config(tmp_path / "sub/d.yaml") == merged


def test_base_keys_reach_the_parser(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "name: a\noptim: {lr: 1e-3, weight_decay: 0}\ndata: {train: t}\nschedule: {epochs: 1}\n"
    )
    (tmp_path / "b.yaml").write_text("base: a.yaml\nname: b\n")
    words = ["--config", str(tmp_path / "b.yaml"), "--optim.weight_decay", "0.5"]
    config = parse_config(LMConfig, words, program="", summary="")
    assert (config.name, config.optim.lr, config.optim.weight_decay) == ("b", 1e-3, 0.5)


@pytest.mark.parametrize(
    ("base", "message"), [("b.yaml", "remove the cycle"), ("missing.yaml", "missing.yaml"), ("3", "base=3")]
)
def test_wrong_base(tmp_path, base, message, capsys):
    (tmp_path / "b.yaml").write_text(f"base: {base}\n")
    with pytest.raises(ConfigError if base != "missing.yaml" else ValueError, match=message):
        read_config(tmp_path / "b.yaml")
    with pytest.raises(SystemExit, match="2"):
        parse_config(LMConfig, [f"--config={tmp_path / 'b.yaml'}"], program="", summary="")
    assert message in capsys.readouterr().err


def test_paper_settings():
    rates = {name: resolve(f"lm/{name}").optim.lr for name in ("dense_0.12b_20tpp", "dense_0.12b_20tpp_qdmoa")}
    assert rates == {"dense_0.12b_20tpp": 2e-3, "dense_0.12b_20tpp_qdmoa": 3e-3}
    long = resolve("lm/dense_0.12b_100tpp")
    assert (long.optim.lr, long.schedule.tokens_per_parameter) == (4e-3, 100)
    experts = named_config("moe-2b", "qdmoa")
    assert (experts.num_experts, experts.num_experts_per_tok, experts.num_shared_experts) == (32, 4, 1)
    mae = resolve("mae/vit_b16_qdmoa_800ep")
    assert (mae.schedule.epochs, mae.schedule.batch_size, mae.schedule.warmup_epochs) == (800, 4096, 40)
    assert (mae.optim.lr, resolve("mae/vit_b16_swiglu_800ep").optim.lr) == (1.2e-3, 3e-4)
    assert (mae.model.mask_ratio, mae.model.norm_pix_loss, mae.data.crop_scale) == (0.75, True, (0.2, 1.0))


def test_llama_large_sees_the_tokens_of_the_baseline():
    wide, narrow = named_config("llama-large", "swiglu"), named_config("dense-0.12b", "swiglu")
    assert wide.intermediate_size == narrow.intermediate_size + 2
    assert budgeted(wide, "llama-large") == budgeted(narrow, "dense-0.12b")


def steps_and_tokens(config):
    """Return optimizer steps and tokens of a step."""
    model = named_config(config.model.size, config.model.ffn)
    tokens = config.schedule.batch_size * config.data.sequence_length
    return config.schedule.budget(1, tokens, budgeted(model, config.model.size)).total_steps, tokens


def muon_flops(model):
    """Return FLOPs of Muon's orthogonalizations in one step."""
    with torch.device("meta"):
        whole = MoALlamaForCausalLM(model)
    return sum(orthogonalize_flops(whole.get_parameter(name).shape) for name in hidden_matrices(whole))


@pytest.mark.parametrize("name", [name for name in LM_FILES if "% utilization" in text_of(name)])
def test_cost_in_the_header(name):
    """Steps, FLOPs and hours as the trainer and plan.py count them."""
    text, config = text_of(name), resolve(name)
    (stated,) = re.findall(r"([\d,]+) steps x ([\d,]+) tokens x ([\d.]+) GFLOPs = ([\d.e+]+) FLOPs", text)
    model = named_config(config.model.size, config.model.ffn)
    steps, tokens = steps_and_tokens(config)
    flops = 3 * forward_flops(model, config.data.sequence_length) / config.data.sequence_length
    assert [int(number.replace(",", "")) for number in stated[:2]] == [steps, tokens]
    assert float(stated[2]) == pytest.approx(flops / 1e9, rel=0.006)
    assert float(stated[3]) == pytest.approx(steps * tokens * flops, rel=0.05)
    muon = muon_flops(model) if config.optim.algorithm == "muon" else 0
    assert re.findall(r"and ([\d.]+) TFLOPs a step for Muon", text) == ([f"{muon / 1e12:.3g}"] if muon else [])
    seconds = steps * (tokens * flops / 8 + muon) / (ASSUMED_UTILIZATION * bf16_peak_flops("H200"))
    ((time, unit),) = re.findall(r"([\d.]+) (minutes|hours) of 8 H200", text)
    assert time == f"{seconds / {'minutes': 60, 'hours': 3600}[unit]:.{1 if '.' in time else 0}f}"


@pytest.mark.slow
def test_streamed_tokens_cover_every_recipe():
    """Recipes that share a data folder name one command, which makes just enough tokens for the longest of them."""
    limits, needed = {}, {}
    for name in LM_FILES:
        for limit, fraction, folder in re.findall(
            r"--val-fraction (\S+) --max-tokens (\S+) --out (\S+)", text_of(name)
        ):
            limits.setdefault(folder, set()).add((limit, fraction))
        config = resolve(name)
        if config.data.train.startswith("data/fineweb"):
            steps, tokens = steps_and_tokens(config)
            needed.setdefault(config.data.train.removesuffix("/train"), []).append(steps * tokens)
    assert limits.keys() == needed.keys() and all(len(commands) == 1 for commands in limits.values())
    for folder, ((fraction, limit),) in limits.items():
        assert 0.98 < max(needed[folder]) / int(limit) < 1
        assert int(limit) * float(fraction) > 1.4 * 4096 * 1024
