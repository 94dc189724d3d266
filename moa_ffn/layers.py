"""The feedforward layer: weights, initialization, mixing coefficients, choice of backend."""

# No `from __future__ import annotations`: torch.fx copies the annotations of `forward` into TorchScript, as objects.

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from moa_ffn.activations import ACTIVATIONS, resolve_activations, split_parameters
from moa_ffn.backends import BACKENDS, cpu, is_plain, select_backend
from moa_ffn.backends.triton import layer as triton_layer
from moa_ffn.coefficients import Coefficients, init_mixing, mixing_coefficients
from moa_ffn.mixing import mixture
from moa_ffn.spec import DEFAULT_GATE_ACTIVATIONS, DEFAULT_UP_ACTIVATIONS, FFNSpec


class FFN(nn.Module):
    """Feedforward layer of the MoA family: down(sum_kl C_kl(x) f_k(a) g_l(b)), a = gate_proj(x), b = up_proj(x).

    Type-I variants have no up branch (b = 1). Formulas: arXiv:2605.26647. The paper leaves open the fields of `FFNSpec`
    and `bias`, `mix_init_std` and `coef_init`.

    Args:
        dim: Width of the input and output.
        hidden_dim: Width H of the hidden layer.
        variant: One of `moa_ffn.VARIANTS`.
        mixing_gate, gate_activations, up_activations, mixed_branch, mix_bias, mix_base, anchor, mix_pool: See
            `FFNSpec`. A dictionary is a sequence or text such as "g,s,r2"; None is the default one.
        bias: Bias on gate_proj, up_proj and down_proj. Default False, as in the formulas and in Llama.
        mix_init_std: Standard deviation of the normal initialization of the mixing vectors u_k. With 0, every sigmoid
            coefficient starts at 1/2 and every tanh coefficient at 0, which blocks the first step's gradients.
            Ignored with mix_base="anchor", where they start at 0.
        coef_init: Initial value of every LA coefficient. Default 1/2, where a sigmoid MoA starts too. Ignored with
            mix_base="anchor".
        drop: Dropout probability after the mixture and after down_proj, or a pair of them, as in timm's Mlp.
        backend: "eager": plain torch operations. "cpu": the whole layer by blocks of tokens, in float32 or float64 on
            a CPU without autocast, with a mixture compiled by Inductor if a C++ compiler is installed. "triton": fused
            GPU kernels in float32, bfloat16 or float16, differentiable once. "auto": the fastest available one, and
            plain operations wherever torch traces, transforms or intercepts the layer. All agree up to rounding.

    Shape:
        input (..., dim), with mix_pool (..., tokens, dim); output shaped alike, in the parameters' dtype or autocast's.

    Raises:
        ValueError: A setting has a value that is not allowed.
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
        mix_base: str = "none",
        anchor: str | None = None,
        mix_pool: bool = False,
        mix_init_std: float = 0.02,
        coef_init: float = 0.5,
        drop: float | tuple[float, float] = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or hidden_dim < 1:
            raise ValueError(f"dim={dim} and hidden_dim={hidden_dim} must be at least 1")
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
            mix_base,
            anchor,
            mix_pool,
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
        parameters = self.spec.num_activation_parameters
        self.act_param = nn.Parameter(torch.empty(parameters, device=device, dtype=dtype)) if parameters else None
        self.drop1, self.drop2 = (nn.Dropout(p) for p in (drop if isinstance(drop, tuple) else (drop, drop)))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, linear_init: Callable[[Tensor], object] | None = None) -> None:
        """Initialize all weights: projections by `linear_init`, biases to 0, mixing by `mix_init_std` and `coef_init`.

        The default of `linear_init` is timm's truncated normal with standard deviation 0.02. A model must call this
        after its own initialization; timm does.
        """
        for projection in (self.gate_proj, self.up_proj, self.down_proj):
            if projection is not None:
                if linear_init is None:
                    nn.init.trunc_normal_(projection.weight, std=0.02)
                else:
                    linear_init(projection.weight)
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)
        self.init_mixing()

    @torch.no_grad()
    def init_mixing(self) -> None:
        """Initialize all but the projections: mixing vectors or constants, and parameters of activations."""
        vectors = None if self.mix_proj is None else self.mix_proj.weight
        if self.mix_proj is not None and self.mix_proj.bias is not None:
            nn.init.zeros_(self.mix_proj.bias)
        init_mixing(self.spec, vectors, self.mix_coef, self.act_param, std=self.mix_init_std, coef=self.coef_init)

    def coefficients(self, x: Tensor) -> Coefficients:
        """Return the mixing coefficients of tokens x (..., dim) in factored form."""
        mix, act = self._mix(x), self.act_param
        found = Coefficients() if mix is None else mixing_coefficients(self.spec, mix.expand(*x.shape[:-1], -1))
        return found._replace(act=None if act is None else act.expand(*x.shape[:-1], -1))

    def _mix(self, x: Tensor) -> Tensor | None:
        """Return the logits (..., n) of MoA, the coefficients (n,) of LA, or None for a fixed FFN."""
        if self.mix_proj is None:
            return self.mix_coef
        return self.mix_proj(x.mean(-2, keepdim=True).expand_as(x) if self.spec.mix_pool else x)

    def mixing(self, x: Tensor) -> Tensor:
        """Return the coefficient matrix C(x) (..., K1, K2) of tokens x (..., dim); K2 is 1 for Type-I."""
        return self.coefficients(x).matrix(x)

    def shares(self, x: Tensor) -> Tensor:
        """Return the share (..., K1, K2) of each term in the mixture of tokens x (..., dim); shares sum to 1.

        A share is the RMS over the hidden width of C_kl(x) f_k(a) g_l(b), divided by the sum over all terms. Unlike a
        coefficient, it includes the size of the activations. It is 0 if every term is 0.
        """
        a = self.gate_proj(x)
        b = None if self.up_proj is None else self.up_proj(x)
        f, g = (
            [ACTIVATIONS[name].function(branch, *given).square() for name, given in zip(names, parameters, strict=True)]
            for branch, names, parameters in zip(
                (a, b), self.spec.dictionaries, split_parameters(self.act_param, *self.spec.dictionaries), strict=True
            )
        )
        g = g or [None]
        energy = [[(fk if gl is None else fk * gl).mean(-1) for gl in g] for fk in f]
        size = torch.stack([torch.stack(row, -1) for row in energy], -2).sqrt() * self.mixing(x).abs()
        return size / size.sum((-2, -1), keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (..., dim).

        Raises:
            ValueError: The requested backend is unavailable; the message gives the reason.
        """
        backend = self.choose_backend(x)
        if backend == "cpu":
            return self._by_blocks(x)
        if backend == "triton" and self._can_pack():
            linears = [linear for linear in (self.gate_proj, self.up_proj, self.mix_proj) if linear is not None]
            return triton_layer.ffn(x, linears, self.mix_coef, self.act_param, self.down_proj, self.spec)
        a = self.gate_proj(x)
        b = None if self.up_proj is None else self.up_proj(x)
        hidden = mixture(a, b, self._mix(x), self.spec, "auto" if self.backend == "auto" else backend, self.act_param)
        return self.drop2(self.down_proj(self.drop1(hidden)))

    def choose_backend(self, x: Tensor) -> str:
        """Return the name of the backend that computes the layer for x (..., dim).

        Raises:
            ValueError: The requested backend is unavailable; the message gives the reason.
        """
        linears = (self.gate_proj, self.up_proj, self.down_proj)
        return select_backend(self.backend, x, self.spec, linears, self._drops())

    def _drops(self) -> bool:
        return self.training and (self.drop1.p > 0 or self.drop2.p > 0)

    def _can_pack(self) -> bool:
        """Return whether the projections can be fused into one matrix product."""
        if self._drops() or self.spec.mix_pool or not is_plain(self.gate_proj):
            return False
        return all(is_plain(p, self.gate_proj.weight.dtype) for p in (self.up_proj, self.mix_proj, self.down_proj))

    def _by_blocks(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        up_weights = (None, None) if up is None else (up.weight, up.bias)
        weights = cpu.Weights(gate.weight, gate.bias, *up_weights, down.weight, down.bias)
        return cpu.ffn(x, self.coefficients(x), weights, self.spec.dictionaries)

    def __prepare_scriptable__(self) -> nn.Module:
        """Return the plain operations of this layer, which `torch.jit.script` compiles instead of it."""
        return torch.fx.symbolic_trace(self)

    def mixing_parameters(self) -> int:
        """Return the number of parameters that the mixture and trainable activations add."""
        mixing = [self.mix_coef, self.act_param, *(() if self.mix_proj is None else self.mix_proj.parameters())]
        return sum(parameter.numel() for parameter in mixing if parameter is not None)

    def extra_repr(self) -> str:
        """Return the settings shown by `print(model)`."""
        return str(self.spec)
