"""Training: gradients, checkpointing, compilation, and the losses of experts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from moa_ffn import VARIANTS

EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILY = [*VARIANTS, "moe"]


def fields(name: str) -> dict[str, Any]:
    """Configuration fields of a member of FAMILY."""
    return {**EXPERTS, "ffn_variant": "qdmoa"} if name == "moe" else {"ffn_variant": name}


def error(ours: Tensor, theirs: Tensor) -> float:
    """Relative RMS error."""
    return ((ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()).item()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def enable_checkpointing(model: nn.Module, options: dict[str, Any] | None = None) -> None:
    # The second is the first one's name in earlier releases of transformers.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


@pytest.mark.parametrize("name", ["relu2", "bila", "moe"])
def test_one_step_changes_every_parameter(name, tiny, tokens):
    model = tiny(**fields(name)).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    input_ids = tokens(4, 16)
    first = model(input_ids, labels=input_ids).loss
    first.backward()
    optimizer.step()
    assert torch.isfinite(first)
    assert model(input_ids, labels=input_ids).loss < first
    assert [n for n, p in model.named_parameters() if torch.equal(p, before[n])] == []


@pytest.mark.parametrize("name", ["swiglu", "qdmoa", "bila", "moe"])
def test_gradient_checkpointing_keeps_gradients(name, tiny, tokens):
    input_ids = tokens(2, 12)
    found, calls = [], []
    for checkpointing in (False, True):
        model = tiny(**fields(name)).train()
        if checkpointing:
            enable_checkpointing(model)
        count = []
        model.model.layers[0].self_attn.register_forward_hook(lambda *_, count=count: count.append(1))
        model(input_ids, labels=input_ids).loss.backward()
        found.append(gradients(model))
        calls.append(len(count))
    assert calls == [1, 2]  # computed again in the backward
    assert found[0].keys() == found[1].keys()
    for parameter, gradient in found[0].items():
        assert torch.allclose(found[1][parameter], gradient, rtol=1e-6, atol=1e-9), parameter


def test_reentrant_checkpointing_of_experts_raises(tiny, tokens):
    model = tiny(**EXPERTS).train()
    enable_checkpointing(model, {"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant"):
        model(tokens(1, 5), labels=tokens(1, 5))


def test_losses_of_experts(tiny, tokens):
    """Cross-entropy by torch, balance and z-loss by their formulas, without padding."""
    model = tiny(**EXPERTS, router_aux_loss_coef=0.3, router_z_loss_coef=0.2)
    input_ids = tokens(2, 9)
    mask = torch.ones_like(input_ids)
    mask[1, 6:] = 0
    labels = input_ids.masked_fill(mask == 0, -100)
    out = model(input_ids, attention_mask=mask, labels=labels, output_router_logits=True)
    cross_entropy = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    balance, squares = [], []
    assert [logits.shape for logits in out.router_logits] == [(18, 6)] * 2
    for logits in out.router_logits:
        for sequence, length in zip(logits.double().view(2, 9, 6), (9, 6), strict=True):
            probabilities = sequence[:length].softmax(-1)
            share = F.one_hot(probabilities.topk(2).indices, 6).sum((0, 1)) / (2 * length)
            balance.append(6 * (share * probabilities.mean(0)).sum())
        squares.append(logits.double().logsumexp(-1).square().view(2, 9)[mask > 0].mean())
    assert torch.allclose(out.lm_loss, cross_entropy, rtol=1e-5)
    assert torch.allclose(out.aux_loss.double(), torch.stack(balance).mean(), rtol=1e-5)
    assert torch.allclose(out.z_loss.double(), torch.stack(squares).mean(), rtol=1e-5)
    assert torch.allclose(out.loss, out.lm_loss + 0.3 * out.aux_loss + 0.2 * out.z_loss)


def test_router_outputs_on_request(tiny, tokens):
    model, input_ids = tiny(**EXPERTS), tokens(1, 5)
    plain = model(input_ids)
    assert plain.router_logits is plain.aux_loss is plain.z_loss is plain.loss is None
    trained = model(input_ids, labels=input_ids)
    assert trained.router_logits is None and trained.aux_loss is not None
    asked = model(input_ids, output_router_logits=True)
    assert len(asked.router_logits) == 2 and asked.aux_loss is not None and asked.loss is None
    assert len(model.model(input_ids, output_router_logits=True).router_logits) == 2
    dense = tiny()(input_ids, labels=input_ids, output_router_logits=True)
    assert dense.router_logits is dense.aux_loss is None
    assert dense.loss is dense.lm_loss


def test_accumulated_losses_equal_the_whole_batch(tiny, tokens):
    """With num_items_in_batch, as in transformers' Trainer, two micro-batches give the gradient of the whole batch."""
    input_ids = tokens(4, 10)
    whole, parts = tiny(**EXPERTS, router_aux_loss_coef=1.0), tiny(**EXPERTS, router_aux_loss_coef=1.0)
    whole(input_ids, labels=input_ids).loss.backward()
    for piece in input_ids.split(2):
        parts(piece, labels=piece, num_items_in_batch=torch.tensor(4 * 9)).loss.backward()
    expected = gradients(whole)
    for name, gradient in gradients(parts).items():
        assert error(gradient, expected[name]) < 1e-5, name


@pytest.mark.parametrize("name", ["qdmoa", "moe"])
def test_transformers_trainer(name, tiny, tokens, tmp_path):
    model = tiny(**fields(name))
    data = [{"input_ids": row, "labels": row} for row in tokens(8, 10)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    shapes = []
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda prediction: shapes.append(prediction.predictions.shape) or {},
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert shapes == [(8, 10, 101)] * 2  # logits alone, not a tuple with the losses
