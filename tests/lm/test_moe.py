"""MoE against transformers' sparse blocks, FFN modules applied per token, and finite differences."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import MixtralConfig, Qwen2MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from moa_ffn import FFN
from moa_lm.configuration import MoALlamaConfig
from moa_lm.moe import MoE

SEVERAL = ("relu2", "qdmoa", "bila")
MIXINGS = ("layer", "expert")


def configure(**fields) -> MoALlamaConfig:
    """A small configuration."""
    return MoALlamaConfig(
        **{
            "hidden_size": 12,
            "num_attention_heads": 1,
            "head_dim": 2,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "vocab_size": 16,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            **fields,
        }
    )


def make(dtype: torch.dtype = torch.float32, **fields) -> MoE:
    """An MoE with weights of scale 1/sqrt(fan_in)."""
    moe = MoE(configure(**fields)).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in moe.named_parameters():
            scale = 0.5 if name.endswith(("bias", "coef")) else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return moe


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(module: nn.Module, hidden: Tensor, function=None) -> dict:
    """Output, and gradients of input and parameters for a fixed random gradient of the output."""
    hidden = hidden.clone().requires_grad_()
    module.zero_grad()
    out = module(hidden) if function is None else function(hidden)
    out.backward(tokens(*out.shape, dtype=out.dtype, seed=99))
    grads = {"hidden": hidden.grad} | {name: parameter.grad for name, parameter in module.named_parameters()}
    missing = [name for name, grad in grads.items() if grad is None]
    assert not missing, f"no gradient reaches {missing}"
    return {"out": out.detach(), **grads}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, value.abs().max().item())
        torch.testing.assert_close(
            actual[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def with_method(moe: MoE, method: str) -> MoE:
    moe.experts.method = method
    return moe


def one_by_one(moe: MoE, hidden: Tensor, config: MoALlamaConfig) -> Tensor:
    """The definition: each token's experts as `FFN` modules with slices of the weights."""
    experts = moe.experts
    ffn = FFN(config.hidden_size, config.moe_intermediate_size, **config.ffn_arguments(), dtype=hidden.dtype)
    rows = []
    for x in hidden.reshape(-1, hidden.shape[-1]):
        probabilities = torch.softmax(moe.router.weight @ x, dim=0)
        values, chosen = torch.topk(probabilities, moe.router.top_k)
        values = values / values.sum() if moe.router.normalize else values
        parts = [v * functional_call(ffn, _slices(experts, int(e)), (x,)) for v, e in zip(values, chosen, strict=True)]
        shared = torch.zeros_like(x) if moe.shared_experts is None else moe.shared_experts(x)
        rows.append(torch.stack(parts).sum(0) + shared)
    return torch.stack(rows).view(hidden.shape)


def _slices(experts: nn.Module, expert: int) -> dict[str, Tensor]:
    """State dict of an FFN with the weights of one expert."""
    state = {}
    for name, parameter in experts.named_parameters():
        once_per_layer = name == "act_param" or (name.startswith("mix_") and experts.mixing == "layer")
        value = parameter if once_per_layer else parameter[expert]
        if name in ("mix_coef", "act_param"):
            state[name] = value
        else:
            state[f"{name.removesuffix('_bias')}.{'bias' if name.endswith('_bias') else 'weight'}"] = value
    return state


@pytest.mark.parametrize(("variant", "mixing"), list(itertools.product(("moa", "onemoa", "xielu", *SEVERAL), MIXINGS)))
@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
def test_output_is_the_weighted_sum_of_ffns(variant, mixing, biases):
    settings = {"mlp_bias": biases, "ffn_mix_bias": biases, "norm_topk_prob": not biases}
    settings |= {"ffn_variant": variant, "expert_mixing": mixing}
    moe, hidden = make(torch.float64, **settings), tokens(2, 5, 12, dtype=torch.float64)
    expected = gradients(moe, hidden, lambda x: one_by_one(moe, x, configure(**settings)))
    for method in ("loop", "blocks"):
        assert_same(gradients(with_method(moe, method), hidden), expected, 1e-12)


@pytest.mark.parametrize(("variant", "mixing"), list(itertools.product(SEVERAL, MIXINGS)))
@pytest.mark.parametrize(("dim", "width"), [(12, 20), (11, 7)], ids=["aligned", "odd"])
def test_dispatch_methods_agree(variant, mixing, dim, width):
    fields = {"hidden_size": dim, "moe_intermediate_size": width, "ffn_variant": variant, "expert_mixing": mixing}
    moe = make(mlp_bias=dim == 11, ffn_mix_bias=dim == 11, **fields)
    hidden = tokens(2, 9, dim)
    expected = gradients(with_method(moe, "loop"), hidden)
    for method in ("grouped", "blocks"):
        assert_same(gradients(with_method(moe, method), hidden), expected, 1e-5)


def test_gradcheck():
    fields = {"hidden_size": 4, "moe_intermediate_size": 3, "num_experts": 3, "num_experts_per_tok": 2}
    moe = make(torch.float64, ffn_variant="qdmoa", expert_mixing="expert", mlp_bias=True, **fields)
    names = [name for name, _ in moe.named_parameters()]

    def function(hidden, *values):
        return functional_call(moe, dict(zip(names, values, strict=True)), (hidden,))

    hidden = tokens(1, 3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(function, (hidden, *(p.detach().requires_grad_() for p in moe.parameters())))


def theirs_and_ours(block: nn.Module, moe: MoE, hidden: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copy our weights to transformers' block; return both results under our names."""
    experts = moe.experts
    with torch.no_grad():
        block.gate.weight.copy_(moe.router.weight)
        block.experts.gate_up_proj.copy_(torch.cat([experts.gate_proj, experts.up_proj], dim=1))
        block.experts.down_proj.copy_(experts.down_proj)
    theirs = gradients(block, hidden)
    gate, up = theirs["experts.gate_up_proj"].chunk(2, dim=1)
    same = {name: theirs[name] for name in ("out", "hidden", "experts.down_proj")}
    renamed = {"router.weight": theirs["gate.weight"], "experts.gate_proj": gate, "experts.up_proj": up}
    return {**same, **renamed}, gradients(moe, hidden)


def test_swiglu_equals_mixtral():
    moe = make(ffn_variant="swiglu", num_shared_experts=0)
    config = MixtralConfig(hidden_size=12, intermediate_size=20, num_local_experts=6, num_experts_per_tok=3)
    config._experts_implementation = "eager"
    theirs, ours = theirs_and_ours(MixtralSparseMoeBlock(config), moe, tokens(2, 10, 12))
    assert_same(ours, theirs, 1e-5)


def test_swiglu_with_a_shared_expert_equals_qwen2_moe():
    """Without normalization of the weights."""
    moe = make(ffn_variant="swiglu", norm_topk_prob=False, num_shared_experts=2)
    config = Qwen2MoeConfig(
        hidden_size=12,
        moe_intermediate_size=20,
        shared_expert_intermediate_size=40,
        num_experts=6,
        num_experts_per_tok=3,
        norm_topk_prob=False,
    )
    config._experts_implementation = "eager"
    block = Qwen2MoeSparseMoeBlock(config)
    block.shared_expert.load_state_dict(moe.shared_experts.state_dict())
    hidden = tokens(2, 10, 12)
    hidden[..., 0] = 1.0
    with torch.no_grad():  # Qwen2's gate of the shared expert: sigmoid(100 * 1) is 1, and its derivative 0
        block.shared_expert_gate.weight.copy_(F.one_hot(torch.tensor([0]), 12) * 100.0)
    theirs, ours = theirs_and_ours(block, moe, hidden)
    assert_same({name: ours[name] for name in theirs}, theirs, 1e-5)


@pytest.mark.parametrize("method", ["blocks", "grouped", "loop"])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_output_of_a_token_does_not_depend_on_its_batch(method, mixing):
    moe = with_method(make(expert_mixing=mixing), method)
    hidden = tokens(4, 8, 12)
    with torch.no_grad():
        whole = moe(hidden)
        order = torch.tensor([2, 0, 3, 1])
        crowd = torch.cat([hidden[:1], hidden[:1, :1].expand(6, 8, -1)])  # everyone wants the first token's experts
        for other, expected in (
            (moe(hidden[order]), whole[order]),
            (moe(hidden[:1]), whole[:1]),
            (moe(hidden.flip(1)).flip(1), whole),
            (moe(crowd)[:1], whole[:1]),
            (torch.cat([moe(token) for token in hidden.view(-1, 1, 12)]).view_as(whole), whole),
        ):
            torch.testing.assert_close(other, expected, rtol=0, atol=1e-6 * whole.abs().max().item())


@pytest.mark.parametrize("method", ["grouped", "loop"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16"])
def test_half_precision(method, autocast):
    moe = make(expert_mixing="expert", moe_intermediate_size=16, hidden_size=16).to(torch.bfloat16)
    hidden = tokens(2, 8, 16, dtype=torch.bfloat16)
    exact = make(torch.float64, expert_mixing="expert", moe_intermediate_size=16, hidden_size=16)
    exact.load_state_dict({name: value.double() for name, value in moe.state_dict().items()})
    expected = gradients(exact, hidden.double())
    if autocast:
        moe, hidden = moe.float(), hidden.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual = gradients(with_method(moe, method), hidden)
    assert actual["out"].dtype == torch.bfloat16
    for name, value in expected.items():
        error = (actual[name].double() - value).square().mean().sqrt() / value.square().mean().sqrt()
        assert error < 1.5e-2, (name, error)


@pytest.mark.parametrize(
    ("variant", "mixing", "backend", "lengths"),
    [("bimoa", "layer", "eager", (5, 9)), ("bila", "expert", "aot_eager", (5,))],
    ids=["dynamic", "backward"],
)
def test_compiles_into_one_graph(variant, mixing, backend, lengths):
    moe = with_method(make(ffn_variant=variant, expert_mixing=mixing, mlp_bias=True), "auto")
    torch._dynamo.reset()
    compiled = torch.compile(moe, backend=backend, fullgraph=True)
    for length in lengths:  # the second length makes the shape dynamic
        hidden = tokens(2, length, 12)
        expected = gradients(moe, hidden)
        assert_same(gradients(moe, hidden, compiled), expected, 1e-5)
