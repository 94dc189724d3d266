"""The CPU backend: when it is selected and what it leaves to eager."""

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from moa_ffn import FFN, VARIANTS
from moa_ffn.backends import cpu

X = torch.randn(5, 8, requires_grad=True)


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def replace_projection(ffn):
    ffn.gate_proj = Doubled(8, 16, bias=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replace_projection, "plain nn.Linear"),
        (lambda ffn: ffn.down_proj.register_forward_hook(lambda *_: None), "plain nn.Linear"),
        (lambda ffn: ffn.up_proj.register_full_backward_hook(lambda *_: None), "plain nn.Linear"),
        (lambda ffn: nn.utils.parametrizations.weight_norm(ffn.gate_proj), "plain nn.Linear"),
        (lambda ffn: cpu_offload(ffn, execution_device=torch.device("cpu")), "plain nn.Linear"),
        (lambda ffn: setattr(ffn.drop, "p", 0.5), "dropout"),
    ],
    ids=["subclass", "forward hook", "backward hook", "parametrization", "offloaded", "dropout"],
)
def test_auto_uses_eager_and_a_named_backend_gives_the_reason(change, reason):
    ffn = FFN(8, 16, "qdmoa")
    assert ffn.choose_backend(X) == "cpu"
    change(ffn)
    assert ffn.choose_backend(X) == "eager"
    ffn(X).sum().backward()
    ffn.backend = "cpu"
    with pytest.raises(ValueError, match=f"backend='cpu' cannot run: .*{reason}"):
        ffn(X)


def test_half_precision_and_autocast_are_unavailable():
    ffn = FFN(8, 16, "qdmoa", backend="cpu")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="without autocast"):
        ffn(X)
    with pytest.raises(ValueError, match=r"not torch\.bfloat16 on cpu"):
        ffn.bfloat16()(X.bfloat16())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("frozen", ["gate_proj", "down_proj", "mix", "x", "all weights"])
def test_frozen_parts_get_no_gradient(variant, frozen):
    results = []
    for backend in ("eager", "cpu"):
        torch.manual_seed(0)
        ffn = FFN(8, 16, variant, bias=True, backend=backend)
        for name, parameter in ffn.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen) and frozen != "all weights")
        x = torch.randn(5, 8).requires_grad_(frozen != "x")
        ffn(x).sin().sum().backward()
        results.append([x.grad, *(parameter.grad for parameter in ffn.parameters())])
    for expected, actual in zip(*results, strict=True):
        assert (expected is None) == (actual is None)
        if expected is not None:
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_inference_equals_training(variant, monkeypatch):
    monkeypatch.setattr(cpu, "HIDDEN_ELEMENTS", 3 * 16)
    ffn = FFN(8, 16, variant)
    with torch.inference_mode():
        inferred = ffn(X)
    assert torch.equal(inferred, ffn(X))


def test_changed_weights_are_an_error_in_the_backward():
    ffn = FFN(8, 16, "swiglu")
    out = ffn(X)
    with torch.no_grad():
        ffn.down_proj.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
