"""Language-model runs from text to export, against torch's cross-entropy."""

import json
import os
import re
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moa_lm.data import TokenShards
from moa_lm.modeling import MoALlamaForCausalLM, document_positions, labels_within_documents
from moa_lm.pretrain import LMConfig, LMTask, main
from moa_lm.token_shards import TokenSettings, make_tokens
from moa_train.config import parse_config
from moa_train.errors import ConfigError
from moa_train.task import DataParallelRank

SMALL = {
    "model.size": "dense-micro",
    "model.args.hidden_size": 32,
    "model.args.intermediate_size": 48,
    "model.args.num_hidden_layers": 2,
    "data.sequence_length": 16,
    "optim.lr": 1e-2,
    "schedule.tokens": 512,
    "schedule.batch_size": 8,
    "loop.micro_batch_size": 4,
    "loop.log_every": 1,
    "loop.val_every": 2,
    "checkpoint.interval": 2,
    "loop.val_samples": 6,
    "loop.num_diagnostic_samples": 2,
    "loop.trackers": "[]",
}
EXPERTS = {
    "model.size": "moe-micro",
    "model.args.moe_intermediate_size": 24,
    "optim.algorithm": "muon",
    "schedule.decay_fraction": 0.5,
    "schedule.decay_type": "1-sqrt",
}


@pytest.fixture
def arguments(shards, tmp_path):
    def given(name="run", **changed):
        paths = {"data.train": shards / "train", "data.val": shards / "val", "name": name, "out": tmp_path}
        settings = SMALL | paths | {key.replace("__", "."): value for key, value in changed.items()}
        return [f"--{key}={value}" for key, value in settings.items()]

    return given


@pytest.fixture
def train(arguments):
    def run(name="run", **changed):
        AcceleratorState._reset_state(reset_partial_state=True)
        return main(arguments(name, **changed))

    return run


def parsed(arguments):
    return parse_config(LMConfig, arguments, program="pretrain_lm.py", summary="")


def rows(folder, kind):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if row["kind"] == kind]


def test_from_text_to_export(train, shards, tmp_path):
    assert train(model__ffn="qdmoa") == 0
    folder = tmp_path / "run"
    training, validation = rows(folder, "train"), rows(folder, "val")
    assert [row["tokens"] for row in training] == [128, 256, 384, 512]
    assert [row["step"] for row in validation] == [2, 4]
    assert validation[-1]["loss"] < validation[0]["loss"] < 6.0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["tokens"] == 512 and summary["flops_total"] == 512 * summary["flops_per_token"]
    assert summary["parameters"]["mixing"] == 2 * 6 * 32
    assert 0 < summary["bytes_per_token"] < 10 and summary["final"] == {"loss": validation[-1]["loss"]}
    layers = json.loads((folder / "mixing/step_00000004.json").read_text())["layers"]
    assert [layer["layer"] for layer in layers] == ["model.0", "model.1"]
    assert not (folder / "experts").exists()

    model = AutoModelForCausalLM.from_pretrained(folder / "export")
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    assert model.config.eos_token_id == tokenizer.eos_token_id and model.config.vocab_size == 320
    written = model.generate(**tokenizer("the king", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(written[0]).startswith("the king")

    val = TokenShards(shards / "val")
    tokens = torch.stack([torch.from_numpy(val.window(i, 16).astype("int64")) for i in range(6)])
    with torch.no_grad():
        expected = F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert validation[-1]["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_experts_with_muon(train, tmp_path, capsys):
    assert train(model__ffn="qdmoa", **EXPERTS) == 0
    text = capsys.readouterr().out
    assert "Muon: 20 tensors" in text
    assert "2 of decay (1-sqrt) at the end" in text
    for row in rows(tmp_path / "run", "train"):
        assert row["loss"] < 6 and row["aux_loss"] >= 0.9 and row["z_loss"] > 0
    (first, second) = json.loads((tmp_path / "run/experts/step_00000004.json").read_text())["layers"]
    assert sum(first["load"]) == pytest.approx(1) and len(second["load"]) == 8 and second["dropped"] == 0
    assert (tmp_path / "run/mixing/step_00000004.json").exists()


@pytest.mark.parametrize("settings", [{}, EXPERTS], ids=["dense-adamw", "experts-muon"])
def test_resume_is_bit_exact(settings, train, tmp_path, monkeypatch):
    assert train("whole", **settings) == 0
    loss, calls = LMTask.loss, []

    def stopping(self, model, batch):
        calls.append(batch)
        if len(calls) == 6:  # in the third step, after two example batches
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, model, batch)

    with monkeypatch.context() as patched:
        patched.setattr(LMTask, "loss", stopping)
        assert train("cut", **settings) == 75
    assert len(rows(tmp_path / "cut", "train")) < 4
    assert train("cut", **settings) == 0
    clock = ("wall_s", "throughput", "mfu")
    whole, cut = (
        [{key: value for key, value in row.items() if key not in clock} for row in rows(tmp_path / name, "train")]
        for name in ("whole", "cut")
    )
    assert cut == whole
    weights = [(tmp_path / name / "export/model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_document_mask(arguments):
    task = LMTask(parsed(arguments(data__document_mask="true", model__ffn="qdmoa")))
    model, end = task.language_model.eval(), task.train_shards.end_of_text
    batch = next(iter(task.val_batches(DataParallelRank(0, 1, 6))))
    inputs, labels = batch.tokens[:, :-1], labels_within_documents(batch.tokens[:, :-1], batch.tokens[:, 1:], end)
    logits = model(inputs, position_ids=document_positions(inputs, end), use_cache=False).logits
    found = task.val_losses(model, batch)
    expected = F.cross_entropy(logits.mT, labels, reduction="none").sum(-1) / found["weight"]
    assert (found["weight"] == (labels != -100).sum(-1)).all() and (found["weight"] < 16).any()
    torch.testing.assert_close(found["loss"], expected)


def test_budgets(arguments):
    none = {"schedule__tokens": "null"}
    task = LMTask(parsed(arguments(schedule__tokens_per_parameter=2, **none)))
    twin = LMTask(parsed(arguments(schedule__tokens_per_parameter=2, model__ffn="swiglu", **none)))
    parameters = sum(parameter.numel() for parameter in twin.language_model.parameters())
    assert task.budgeted == twin.budgeted == parameters
    assert task.budget(9).total_steps == twin.budget(9).total_steps == round(2 * parameters / (8 * 16))
    task = LMTask(parsed(arguments(schedule__epochs=1.5, **none)))
    assert task.budget(9).total_steps == round(1.5 * 9)
    experts = LMTask(parsed(arguments(schedule__tokens_per_parameter=2, model__ffn="swiglu", **none, **EXPERTS)))
    idle = 2 * 6 * 3 * 24 * 32  # of two layers, the matrices of the six experts that a token does not go to
    assert experts.budgeted == sum(p.numel() for p in experts.language_model.parameters()) - idle
    mixing = {"model__args.expert_mixing": "expert", "model__ffn": "qdmoa", "schedule__tokens_per_parameter": 2}
    assert LMTask(parsed(arguments(**mixing, **none, **EXPERTS))).budgeted == experts.budgeted


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"schedule__epochs": 1}, "schedule needs exactly one of tokens, tokens_per_parameter, epochs"),
        ({"schedule__tokens": 0}, "schedule.tokens is 0; it must be above 0"),
        ({"schedule__warmup_steps": 5}, "schedule.warmup_steps is 5; it must be at most the run's 4 steps"),
        (
            {"model__args.num_layers": 3},
            "model.args.num_layers is 3; it must be a field of",
        ),
        ({"model__args.rms_norm_eps": "x"}, "model.args .*rms_norm_eps"),
        ({"model__args.vocab_size": 320}, "model.args.vocab_size is 320, but the data decide it"),
        ({"data__train": "nowhere"}, "nowhere"),
        ({"data__sequence_length": 4000}, "data.val has"),
        ({"data__sequence_length": 4000, "data__val": "null"}, "training set's"),
    ],
)
def test_check_reports_invalid_runs(changed, message, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*arguments(**changed), "--check"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(message, error), error


def test_logged_loss_is_the_cross_entropy_of_its_step(train, tmp_path):
    """For any logging interval and micro-batch size."""
    plain = {key: value for key, value in EXPERTS.items() if key != "optim.algorithm"}
    assert train("each", **plain) == 0
    assert train("some", loop__log_every=3, loop__micro_batch_size=8, **plain) == 0
    each, some = (rows(tmp_path / name, "train") for name in ("each", "some"))
    assert [row["step"] for row in some] == [3, 4]
    for row in some:
        same = each[row["step"] - 1]
        for key in ("loss", "aux_loss", "z_loss"):
            assert row[key] == pytest.approx(same[key], rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {**EXPERTS, "optim.algorithm": "adamw"}], ids=["dense", "experts"])
def test_label_weights_do_not_depend_on_micro_batches(settings, train, tmp_path):
    """Short windows have different numbers of labels."""
    masked = settings | {"data__document_mask": "true", "data__sequence_length": 8, "schedule__tokens": 128}
    masked |= {"data__val": "null", "optim__lr": 1e-3}
    assert train("whole", loop__micro_batch_size=8, **masked) == 0
    assert train("split", loop__micro_batch_size=2, **masked) == 0
    whole, split = (rows(tmp_path / name, "train") for name in ("whole", "split"))
    for key in whole[0].keys() & {"loss", "grad_norm", "aux_loss", "z_loss"}:
        assert [row[key] for row in split] == pytest.approx([row[key] for row in whole], rel=1e-5), key
    before, after = (load_file(tmp_path / name / "export/model.safetensors") for name in ("whole", "split"))
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-5)


def test_damaged_tokenizer_is_reported_before_training(train, shards, tmp_path, capsys):
    shutil.copytree(shards, tmp_path / "set")
    (tmp_path / "set/train/tokenizer/tokenizer.json").write_text('{"a":')
    assert train(data__train=tmp_path / "set/train", data__val=tmp_path / "set/val") == 2
    error = capsys.readouterr().err
    assert "SHA-256 differs" in error and str(tmp_path / "set/train/tokenizer") in error and "Traceback" not in error


def test_resume_refuses_other_tokens(train, shards, tmp_path, capsys):
    data = {"data__train": tmp_path / "set/train", "data__val": tmp_path / "set/val"}
    shutil.copytree(shards, tmp_path / "set")
    assert train(**data) == 0
    (tmp_path / "run/summary.json").unlink()
    shutil.rmtree(tmp_path / "set")
    texts = "".join(json.dumps({"text": f"once upon a time {n}"}) + "\n" for n in range(300))
    (tmp_path / "text.jsonl").write_text(texts)
    settings = TokenSettings(tokenizer=str(shards / "train" / "tokenizer"), val_fraction=0.2)
    make_tokens([str(tmp_path / "text.jsonl")], tmp_path / "set", settings)
    capsys.readouterr()
    assert train(**data) == 2
    assert "was trained on other data: train, val changed since" in capsys.readouterr().err
    assert train(**data, resume="force") == 0


@pytest.mark.parametrize("experts", [{}, EXPERTS], ids=["dense", "experts"])
def test_variants_share_initial_weights(arguments, experts):
    """All parameters that two variants have in common are equal, for one seed; embeddings and norms come first."""
    given = {key.replace(".", "__"): value for key, value in experts.items()}
    swiglu, qdmoa, other = (
        dict(LMTask(parsed(arguments(model__ffn=ffn, seed=seed, **given))).model.named_parameters())
        for ffn, seed in (("swiglu", 3), ("qdmoa", 3), ("swiglu", 4))
    )
    assert swiglu.keys() < qdmoa.keys()
    assert all(torch.equal(value, qdmoa[name]) for name, value in swiglu.items())
    assert all(not torch.equal(value, other[name]) for name, value in swiglu.items() if value.std() > 0)
    matrices = [value for value in qdmoa.values() if value.ndim > 1]
    assert len({value.flatten()[0].item() for value in matrices}) == len(matrices)  # no two streams are the same


def test_starts_from_a_converted_model(train, arguments, tmp_path):
    assert train(model__ffn="swiglu", schedule__tokens=128) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export")
    MoALlamaForCausalLM.from_llama(theirs, "qdmoa", ffn_mix_base="anchor").save_pretrained(tmp_path / "upcycled")
    start = {"model__ffn": "qdmoa", "model__init_from": tmp_path / "upcycled"}
    ours = LMTask(parsed(arguments(**start, model__args__ffn_mix_base="anchor"))).model
    ids = torch.arange(24).view(2, 12)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    with pytest.raises(ConfigError, match=r"upcycled has ffn_mix_base 'anchor', the model 'none'; set model\.args"):
        LMTask(parsed(arguments(**start)))
