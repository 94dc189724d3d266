"""Chunked cross-entropy against torch's: values, gradients, memory, and as the loss of the models."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moa_lm import loss
from moa_lm.loss import linear_cross_entropy, module_cross_entropy
from moa_lm.modeling import document_positions, labels_within_documents
from moa_lm.transformers_internals import CACHE

EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPED = {**EXPERTS, "expert_dispatch": "grouped"}
END = 7


def error(ours: Tensor, theirs: Tensor) -> float:
    """Relative RMS error."""
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()).item()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def make(n: int, d: int, v: int, *, ignored: float = 0.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Hidden states, weight and labels with about this fraction ignored."""
    generator = torch.Generator().manual_seed(n * d + v)
    hidden = torch.randn(n, d, generator=generator, dtype=dtype)
    weight = torch.randn(v, d, generator=generator, dtype=dtype) / d**0.5
    labels = torch.randint(0, v, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < ignored] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def by_torch(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> tuple[Any, ...]:
    """Loss and gradients in float64."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    total = F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum", **options)
    total.backward()
    tokens = F.cross_entropy(F.linear(hidden, weight), labels, reduction="none", **options).detach()
    return total.detach(), tokens, hidden.grad, weight.grad


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of at least 3 tokens: small cases have several, the last one shorter."""
    monkeypatch.setattr(loss, "MIN_CHUNK", 3)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 50),
    d=st.integers(1, 9),
    v=st.integers(1, 40),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    minimum=st.sampled_from([1, 3, 256]),
)
def test_equals_torch_cross_entropy(n, d, v, ignored, minimum):
    hidden, weight, labels = make(n, d, v, ignored=ignored, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "MIN_CHUNK", minimum)
        found = linear_cross_entropy(hidden, weight, labels)
    (0.3 * found.total).backward()
    total, tokens, by_hidden, by_weight = by_torch(hidden, weight, labels)
    assert torch.allclose(found.total, total) and torch.allclose(found.tokens, tokens)
    assert torch.allclose(hidden.grad, 0.3 * by_hidden) and torch.allclose(weight.grad, 0.3 * by_weight)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_gradients_of_frozen_tensors_are_not_computed(frozen, small_chunks):
    hidden, weight, labels = make(20, 4, 9)
    expected = by_torch(hidden, weight, labels)
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    total = linear_cross_entropy(hidden, weight, labels).total
    assert total.requires_grad is (frozen != "both")
    if frozen != "both":
        total.backward()
    for tensor, gradient in ((hidden, expected[2]), (weight, expected[3])):
        assert (tensor.grad is not None) is tensor.requires_grad
        assert tensor.grad is None or error(tensor.grad, gradient) < 1e-5


def test_ignored_tokens_may_be_nan(small_chunks):
    hidden, weight, labels = make(10, 4, 9)
    labels[4] = -100
    with torch.no_grad():
        hidden[4] = torch.nan
    found = linear_cross_entropy(hidden, weight, labels)
    found.total.backward()
    kept = labels != -100
    assert torch.isfinite(found.total)
    assert error(found.total, by_torch(hidden[kept], weight, labels[kept])[0]) < 1e-5
    assert (hidden.grad[4] == 0).all() and hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=["master weights", "all bfloat16"])
def test_bfloat16(kept):
    """Products in bfloat16, softmax and sums in float32."""
    hidden, weight, labels = make(700, 32, 301)
    expected = by_torch(hidden, weight, labels)
    hidden, weight = (tensor.detach().to(kept).requires_grad_() for tensor in (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, labels)
    found.total.backward()
    assert found.total.dtype == found.tokens.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == kept
    assert error(found.total, expected[0]) < 1e-3
    assert error(found.tokens, expected[1]) < 1e-2
    assert error(hidden.grad, expected[2]) < 1e-2
    assert error(weight.grad, expected[3]) < 1e-2


class Largest(TorchDispatchMode):
    """Number of elements of the largest result of any operation."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("n", [1024, 8192], ids=["chunks of the least size", "most chunks"])
def test_no_operation_computes_all_logits(n):
    hidden, weight, labels = make(n, 8, 300)
    chunk = max(loss.MIN_CHUNK, n // loss.MAX_CHUNKS)
    with Largest() as plain:
        F.cross_entropy(F.linear(hidden, weight), labels).backward()
    with Largest() as ours:
        linear_cross_entropy(hidden, weight, labels).total.backward()
    with Largest() as by_module:
        module_cross_entropy(hidden, partial(F.linear, weight=weight), labels).total.backward()
    assert plain.elements == n * 300
    assert ours.elements == by_module.elements == chunk * 300 < plain.elements / 3


@pytest.mark.parametrize("items", [None, 40, torch.tensor(40)], ids=["mean", "share", "share, tensor"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_skip_logits_keeps_loss_and_gradients(name, tied, items, tiny, tokens, small_chunks):
    input_ids = tokens(3, 9)
    labels = input_ids.clone()
    labels[1, 4:] = -100
    more = {} if items is None else {"num_items_in_batch": items}
    results, found = [], []
    for skip in (False, True):
        model = tiny(tie_word_embeddings=tied, **(EXPERTS if name == "moe" else {})).train()
        results.append(model(input_ids, labels=labels, skip_logits=skip, **more))
        results[-1].loss.backward()
        found.append(gradients(model))
    assert results[0].logits is not None and results[1].logits is results[1].get(CACHE) is None
    assert torch.allclose(results[0].loss, results[1].loss, rtol=1e-6)
    assert torch.allclose(results[0].lm_loss, results[1].lm_loss, rtol=1e-6)
    assert found[0].keys() == found[1].keys()
    for parameter, gradient in found[1].items():
        assert error(gradient, found[0][parameter]) < 1e-5, parameter
    rows = F.cross_entropy(results[0].logits[:, :-1].mT, labels[:, 1:], reduction="none")
    means = rows.sum(-1) / torch.tensor([8, 3, 8])
    assert torch.allclose(results[1].sequence_losses, means, rtol=1e-5)


def test_batch_without_labels_has_zero_loss(tiny, tokens):
    model, input_ids = tiny(), tokens(2, 5)
    out = model(input_ids, labels=torch.full_like(input_ids, -100), skip_logits=True)
    out.loss.backward()
    assert out.loss == 0 and (out.sequence_losses == 0).all()
    assert all((gradient == 0).all() for gradient in gradients(model).values())
    with pytest.raises(ValueError, match="skip_logits=True"):
        model(input_ids, skip_logits=True)


@pytest.mark.parametrize("name", ["qdmoa", pytest.param("moe", marks=pytest.mark.slow)])
def test_training_step_compiles_into_one_graph(name, tiny, tokens, small_chunks):
    model = tiny(**(GROUPED if name == "moe" else {"ffn_variant": name})).train()
    input_ids = tokens(2, 9)
    batch = {"input_ids": input_ids[:, :-1], "shift_labels": input_ids[:, 1:], "skip_logits": True}
    batch["position_ids"] = document_positions(batch["input_ids"], END)
    eager = model(**batch)
    eager.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch)
    compiled.loss.backward()
    assert torch.allclose(compiled.loss, eager.loss, rtol=1e-5)
    assert torch.allclose(compiled.sequence_losses, eager.sequence_losses, rtol=1e-5)
    for parameter, gradient in gradients(model).items():
        assert error(gradient, expected[parameter]) < 1e-4, parameter


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.lists(st.integers(5, 9), min_size=12, max_size=12), min_size=1, max_size=3))
def test_document_positions(rows):
    expected = []
    for row in rows:
        expected.append([])
        place = 0
        for token in row:
            expected[-1].append(place)
            place = 0 if token == END else place + 1
    assert document_positions(torch.tensor(rows), END).tolist() == expected


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_packed_documents_equal_separate_documents(name, attention, tiny, tokens):
    """Logits and losses; rows may begin within a document, and a document may be empty."""
    model = tiny(attn_implementation=attention, **(EXPERTS if name == "moe" else {}))
    rows = tokens(2, 16).masked_fill(tokens(2, 16) == END, END + 1)
    rows[0, [4, 5, 11]] = rows[1, 15] = END
    inputs, labels = rows[:, :-1], rows[:, 1:]
    positions = document_positions(inputs, END)
    logits = model(inputs, position_ids=positions, use_cache=False).logits
    pieces = [(0, 0, 5), (0, 5, 6), (0, 6, 12), (0, 12, 15), (1, 0, 15)]
    total = 0.0
    for row, start, stop in pieces:
        document = rows[row : row + 1, start : min(stop, 15)]
        alone = model(document, use_cache=False).logits
        assert error(logits[row, start:stop], alone[0]) < 1e-5
        # Predicted are the document's own tokens, its end included; of a cut one, also the token after the cut.
        target = rows[row, start + 1 : stop + (stop == 15)]
        total = total + F.cross_entropy(alone[0, : len(target)], target, reduction="sum")
    within = labels_within_documents(inputs, labels, END)
    assert (within == -100).sum() == 3
    packed = model(inputs, position_ids=positions, shift_labels=within, skip_logits=True)
    assert torch.allclose(packed.lm_loss, total / (30 - 3), rtol=1e-5)
    unmasked = model(inputs, use_cache=False).logits
    assert error(unmasked[0, 12:], logits[0, 12:]) > 1e-2  # the mask matters
