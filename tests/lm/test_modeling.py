"""The models against transformers' Llama, transformers' features on the models, and the losses of experts."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.cache_utils import DynamicCache

from moa_lm import MoALlamaForCausalLM, MoALlamaModel
from moa_lm.modeling import document_positions

EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def fields(name: str) -> dict[str, Any]:
    """Configuration fields of a variant, or of qdmoa with experts."""
    return {**EXPERTS, "ffn_variant": "qdmoa"} if name == "moe" else {"ffn_variant": name}


def error(ours: Tensor, theirs: Tensor) -> float:
    """Relative RMS error."""
    return ((ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()).item()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
def test_swiglu_equals_llama(attention, tied, bias, tiny, llama, tokens):
    same = {"tie_word_embeddings": tied, "attn_implementation": attention, "mlp_bias": bias, "attention_bias": bias}
    theirs, ours = llama(**same), tiny(ffn_variant="swiglu", **same)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    input_ids = tokens(3, 11)
    mask = torch.ones_like(input_ids)
    mask[1, :4] = 0
    labels = input_ids.masked_fill(mask == 0, -100)
    results = [model(input_ids, attention_mask=mask, labels=labels) for model in (ours, theirs)]
    assert error(results[0].logits[mask > 0], results[1].logits[mask > 0]) < 1e-5
    assert torch.allclose(results[0].loss, results[1].loss, rtol=1e-5)
    for result in results:
        result.loss.backward()
    expected = gradients(theirs)
    assert gradients(ours).keys() == expected.keys()
    for name, gradient in gradients(ours).items():
        assert error(gradient, expected[name]) < 1e-5, name


@pytest.mark.parametrize("name", ["bila", "moe"])
def test_generation_with_and_without_cache(name, tiny, tokens):
    model = tiny(**fields(name))
    prompt = tokens(2, 5)
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    runs = [
        model.generate(prompt, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    ]
    assert torch.equal(*runs)
    sequence = runs[0][1:]
    greedy = model(sequence).logits.argmax(-1)[0, 4:-1]
    assert torch.equal(greedy, sequence[0, 5:])


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_cache_by_either_argument_name(name, tiny, tokens):
    model, input_ids = tiny(), tokens(1, 9)
    cache = DynamicCache(config=model.config)
    parts = [model(piece, use_cache=True, **{name: cache}).logits for piece in input_ids.split([4, 1, 4], dim=1)]
    assert error(torch.cat(parts, dim=1), model(input_ids).logits) < 1e-5


def test_logits_to_keep(tiny, tokens):
    model, input_ids = tiny(), tokens(2, 8)
    full = model(input_ids).logits
    rows, grid, mask = torch.tensor([1, 6]), torch.tensor([[0, 5], [7, 2]]), torch.arange(16).view(2, 8) % 3 == 0
    by_row = full.take_along_dim(grid.unsqueeze(-1), dim=1)
    for kept, expected in ((3, full[:, -3:]), (rows, full[:, rows]), (grid, by_row), (mask, full[mask])):
        torch.testing.assert_close(model(input_ids, logits_to_keep=kept).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bila", "moe"])
def test_save_and_load_with_auto_classes(name, tiny, tokens, tmp_path):
    model = tiny(**fields(name), ffn_mixing_gate="tanh", ffn_gate_activations="s,r", ffn_up_activations="id,l")
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "moa_llama"
    assert "auto_map" not in (tmp_path / "config.json").read_text()  # no code to be run from the checkpoint
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MoALlamaForCausalLM
    assert torch.equal(loaded(tokens(1, 6)).logits, model(tokens(1, 6)).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is MoALlamaModel
    assert torch.equal(base(tokens(1, 6)).last_hidden_state, model.model(tokens(1, 6)).last_hidden_state)


@pytest.mark.parametrize("name", ["qdmoa", "bila", "moe"])
def test_initialization(name, tiny):
    model = tiny(
        **fields(name),
        **{"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.1, "ffn_mix_init_std": 3.0},
        **{"ffn_coef_init": 0.7, "ffn_mix_bias": True},
    )
    for parameter, value in model.named_parameters():
        if "mix_coef" in parameter:
            assert (value == 0.7).all()
        elif parameter.endswith("bias"):
            assert (value == 0).all()
        elif "norm" in parameter:
            assert (value == 1).all()
        else:
            expected = 3.0 if "mix_proj" in parameter else 0.1
            assert value.std().item() == pytest.approx(expected, rel=0.1), parameter


@pytest.mark.parametrize("variant", ["qdmoa", "bila", "bimoa", "moe"])
def test_missing_mixing_weights_are_initialized_on_load(variant, tiny, tmp_path):
    """Weights that the checkpoint lacks are neither empty nor initialized by Llama's rule."""
    saved = tiny(**{**fields(variant), "ffn_variant": "swiglu"})
    saved.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        ffn_variant=fields(variant)["ffn_variant"],
        ffn_mix_init_std=3.0,
        ffn_coef_init=0.7,
        ffn_mix_bias=variant in ("bimoa", "moe"),
    )
    kept = load_file(tmp_path / "model.safetensors")
    for name, value in loaded.named_parameters():
        if "mix_coef" in name:
            assert (value == 0.7).all()
        elif "mix_proj" in name and name.endswith("bias"):
            assert (value == 0).all()
        elif "mix_proj" in name:
            assert value.std().item() == pytest.approx(3.0, rel=0.3)
        else:
            assert torch.equal(value, kept[name]), name


@pytest.mark.skipif(torch.__version__ < "2.12", reason="transformers makes a mask in every graph of torch 2.11")
@pytest.mark.parametrize("packed", [False, True], ids=["positions left out", "positions of documents"])
def test_compiled_attention_has_a_mask_only_for_packed_documents(packed, tiny, tokens):
    graphs: list[torch.fx.GraphModule] = []

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    model, input_ids = tiny(ffn_variant="qdmoa", ffn_backend="eager"), tokens(2, 12)
    positions = {"position_ids": document_positions(input_ids, int(input_ids[0, 5]))} if packed else {}
    expected = model(input_ids, use_cache=False, **positions).logits
    found = torch.compile(model, backend=look, fullgraph=True)(input_ids, use_cache=False, **positions).logits
    assert torch.equal(found, expected)
    attention = [node.kwargs for node in graphs[0].graph.nodes if node.target is F.scaled_dot_product_attention]
    assert len(graphs) == 1 and len(attention) == model.config.num_hidden_layers
    for arguments in attention:
        assert (arguments["attn_mask"] is not None) == packed and arguments["is_causal"] != packed


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
