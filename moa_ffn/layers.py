"""FFN: the layer. Weights, initialization, mixing coefficients, choice of backend."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from moa_ffn.activations import ACTIVATIONS, resolve_activations
from moa_ffn.backends import BACKENDS, cpu, is_plain, select_backend
from moa_ffn.backends.triton import layer as triton_layer
from moa_ffn.mixing import Coefficients, mixing_coefficients, mixture
from moa_ffn.spec import DEFAULT_GATE_ACTIVATIONS, DEFAULT_UP_ACTIVATIONS, FFNSpec


class FFN(nn.Module):
    """Feedforward layer of the MoA family: down(sum_kl C_kl(x) f_k(a) g_l(b)), a = gate_proj(x), b = up_proj(x).

    Type-I variants have no up branch (b = 1). Source of the formulas: arXiv:2605.26647; its open choices are the
    fields of `FFNSpec` and the three named below.

    Args:
        dim: width of the input and output.
        hidden_dim: width H of the hidden layer.
        variant: one of `moa_ffn.VARIANTS`.
        mixing_gate, gate_activations, up_activations, mixed_branch, mix_bias: see `FFNSpec`. A dictionary
            may be a sequence or text such as "g,s,r2"; None takes the default one.
        bias: bias on gate_proj, up_proj and down_proj. Default False, as in the formulas and in Llama.
        mix_init_std: standard deviation of the normal initialization of the mixing vectors u_k (open in the paper).
            Default 0.02. With 0, every sigmoid coefficient starts at 1/2 and every tanh coefficient at 0, which
            passes no signal to the other weights at the first step.
        coef_init: initial value of every LA coefficient (open). Default 1/2, where a sigmoid MoA starts too.
        drop: dropout probability after the mixture and after down_proj, as in timm's Mlp.
        backend: "eager", plain torch operations; "cpu", the whole layer by blocks of tokens, for float32 and float64
            on a CPU without autocast, its mixture compiled by Inductor where there is a C++ compiler; "triton", fused
            kernels on GPUs, in float32, bfloat16 and float16, differentiable once; "auto", the fastest one that can
            run, and plain operations wherever torch traces, transforms or intercepts the layer. All agree up to
            rounding.

    Shape:
        input (..., dim), output (..., dim), in the parameters' dtype or autocast's.

    Raises:
        ValueError: a setting has a value that is not allowed.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        variant: str = "qdmoa",
        *,
        mixing_gate: str = "sigmoid",
        gate_activations: str | Iterable[str] | None = None,
        up_activations: str | Iterable[str] | None = None,
        bias: bool = False,
        mixed_branch: str = "gate",
        mix_bias: bool = False,
        mix_init_std: float = 0.02,
        coef_init: float = 0.5,
        drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or hidden_dim < 1:
            raise ValueError(f"dim={dim}, hidden_dim={hidden_dim}: both must be at least 1")
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}")
        if mix_init_std < 0:
            raise ValueError(f"mix_init_std={mix_init_std} must not be negative")
        self.spec = FFNSpec(
            variant,
            mixing_gate,
            resolve_activations(gate_activations or DEFAULT_GATE_ACTIVATIONS, "gate_activations"),
            resolve_activations(up_activations or DEFAULT_UP_ACTIVATIONS, "up_activations"),
            mixed_branch,
            mix_bias,
        )
        self.dim, self.hidden_dim, self.backend = dim, hidden_dim, backend
        self.mix_init_std, self.coef_init = mix_init_std, coef_init

        def linear(fan_in: int, fan_out: int, bias: bool) -> nn.Linear:
            return nn.Linear(fan_in, fan_out, bias=bias, device=device, dtype=dtype)

        self.gate_proj = linear(dim, hidden_dim, bias)
        self.up_proj = linear(dim, hidden_dim, bias) if self.spec.type_two else None
        self.down_proj = linear(hidden_dim, dim, bias)
        count = self.spec.num_coefficients
        self.mix_proj = linear(dim, count, mix_bias) if self.spec.token_adaptive else None
        self.mix_coef = (
            nn.Parameter(torch.empty(count, device=device, dtype=dtype)) if self.spec.learned_constant else None
        )
        self.drop = nn.Dropout(drop)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, linear_init: Callable[[Tensor], object] | None = None) -> None:
        """Initialize every weight: projections by `linear_init` (default: normal of standard deviation 0.02, cut at
        two absolute units as in timm), biases zero, mixing as its fields say.

        A model's own initialization must not have the last word on this layer; timm calls this method after its own.
        """
        for projection in (self.gate_proj, self.up_proj, self.down_proj):
            if projection is not None:
                if linear_init is None:
                    nn.init.trunc_normal_(projection.weight, std=0.02)
                else:
                    linear_init(projection.weight)
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)
        if self.mix_proj is not None:
            nn.init.normal_(self.mix_proj.weight, std=self.mix_init_std)
            if self.mix_proj.bias is not None:
                nn.init.zeros_(self.mix_proj.bias)
        if self.mix_coef is not None:
            nn.init.constant_(self.mix_coef, self.coef_init)

    def coefficients(self, x: Tensor) -> Coefficients:
        """The token's mixing coefficients in factored form, for x (..., dim)."""
        mix = self._mix(x)
        if mix is None:
            return Coefficients()
        return mixing_coefficients(self.spec, mix.expand(*x.shape[:-1], -1))

    def _mix(self, x: Tensor) -> Tensor | None:
        """Logits (..., n) of MoA, coefficients (n,) of LA, None of a fixed FFN."""
        return self.mix_coef if self.mix_proj is None else self.mix_proj(x)

    def mixing(self, x: Tensor) -> Tensor:
        """The coefficient matrix C(x) of each token, x (..., dim) -> (..., K1, K2); K2 is 1 for Type-I.

        A fixed branch contributes the coefficient 1.
        """
        gate, up, pair = self.coefficients(x)
        if pair is not None:
            return pair
        one = x.new_ones(*x.shape[:-1], 1)
        return (one if gate is None else gate).unsqueeze(-1) * (one if up is None else up).unsqueeze(-2)

    def shares(self, x: Tensor) -> Tensor:
        """How much each term contributes to a token's sum, x (..., dim) -> (..., K1, K2), adding up to 1.

        The root mean square over the hidden width of C_kl(x) f_k(a) g_l(b), divided by the sum of these over all
        terms: unlike a coefficient, it knows how large the activations are. 0 where every term is 0.
        """
        a = self.gate_proj(x)
        b = None if self.up_proj is None else self.up_proj(x)
        f = [ACTIVATIONS[name].function(a).square() for name in self.spec.gate_dictionary]
        g = [None] if b is None else [ACTIVATIONS[name].function(b).square() for name in self.spec.up_dictionary]
        energy = [[(fk if gl is None else fk * gl).mean(-1) for gl in g] for fk in f]
        size = torch.stack([torch.stack(row, -1) for row in energy], -2).sqrt() * self.mixing(x).abs()
        return size / size.sum((-2, -1), keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (..., dim).

        Raises:
            ValueError: the backend was asked for by name and cannot run; the message says why.
        """
        backend = self.choose_backend(x)
        if backend == "cpu":
            return self._by_blocks(x)
        if backend == "triton" and self._can_pack():
            linears = [linear for linear in (self.gate_proj, self.up_proj, self.mix_proj) if linear is not None]
            return triton_layer.ffn(x, linears, self.mix_coef, self.down_proj, self.spec)
        a = self.gate_proj(x)
        b = None if self.up_proj is None else self.up_proj(x)
        hidden = mixture(a, b, self._mix(x), self.spec, "auto" if self.backend == "auto" else backend)
        return self.drop(self.down_proj(self.drop(hidden)))

    def choose_backend(self, x: Tensor) -> str:
        """Name of the backend that computes the layer for x (..., dim).

        Raises:
            ValueError: the backend was asked for by name and cannot run; the message says why.
        """
        linears = (self.gate_proj, self.up_proj, self.down_proj)
        return select_backend(self.backend, x, self.spec, linears, self._drops())

    def _drops(self) -> bool:
        return self.training and self.drop.p > 0

    def _can_pack(self) -> bool:
        """Whether the projections may be taken as the matrices that they are."""
        if self._drops() or not is_plain(self.gate_proj):
            return False
        return all(is_plain(p, self.gate_proj.weight.dtype) for p in (self.up_proj, self.mix_proj, self.down_proj))

    def _by_blocks(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        up_weights = (None, None) if up is None else (up.weight, up.bias)
        inputs = cpu.Inputs(x, *self.coefficients(x), gate.weight, gate.bias, *up_weights, down.weight, down.bias)
        return cpu.ffn(inputs, self.spec.gate_dictionary, self.spec.up_dictionary)

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` compiles in this layer's place: the plain operations of its settings."""
        return torch.fx.symbolic_trace(self)

    def mixing_parameters(self) -> int:
        """Number of parameters that the mixture adds, counted."""
        mixing = [self.mix_coef, *(() if self.mix_proj is None else self.mix_proj.parameters())]
        return sum(parameter.numel() for parameter in mixing if parameter is not None)

    def extra_repr(self) -> str:
        """Settings shown by print(model)."""
        return str(self.spec)
