"""Requirements of a language model's run, for the estimate on target hardware."""

from __future__ import annotations

from pathlib import Path

import torch

from moa_lm.configuration import MoALlamaConfig
from moa_lm.data import TokenShards
from moa_lm.flops import forward_flops
from moa_lm.groups import hidden_matrices
from moa_lm.modeling import MoALlamaForCausalLM
from moa_lm.pretrain import LMConfig, budgeted, model_config
from moa_lm.sizes import VOCAB_SIZE, count_parameters
from moa_train.config import parse_config
from moa_train.devices import SavedBytes, trace_saved_bytes
from moa_train.errors import ConfigError
from moa_train.estimate import Workload, count_states
from moa_train.plan import TRAINING_FLOPS_PER_FORWARD


def lm_workload(config: LMConfig, *, tokens: int | None = None) -> Workload:
    """Return the requirements of a language model's run; without its shards GPT-2's vocabulary is assumed.

    `tokens` replaces the number of training tokens of local shards.

    Raises:
        ConfigError: The model is not possible, or the schedule counts epochs of an unknown number of tokens.
        DataError: Local shards cannot be read.
    """
    length, batch, assumed = config.data.sequence_length, config.schedule.batch_size, []
    if (Path(config.data.train).expanduser() / "manifest.json").exists():
        shards = TokenShards(config.data.train)
        model, tokens = model_config(config.model, shards, length), tokens or shards.tokens
    else:
        model = model_config(config.model, None, length)
        assumed.append(f"a vocabulary of {VOCAB_SIZE:,} (GPT-2's), since data.train is absent")
    if tokens is None:
        if config.schedule.epochs is not None:
            raise ConfigError("schedule.epochs needs the number of training tokens; add --tokens N")
        tokens = length * batch + 1  # one step per epoch: a budget in tokens does not depend on it
    parameters = budgeted(model, config.model.size)
    with torch.device("meta"):
        whole = MoALlamaForCausalLM(model)
    muon = _muon_shapes(config, whole)
    return Workload(
        title=f"{config.model.size} with {config.model.ffn}; sequences of {length:,} tokens",
        parameters=count_parameters(model)._asdict(),
        unit="tok",
        units_per_sample=length,
        samples_per_epoch=(tokens - 1) // length,
        budget=lambda steps: config.schedule.budget(steps, batch * length, parameters),
        flops_per_sample=TRAINING_FLOPS_PER_FORWARD * forward_flops(model, length),
        states=count_states(whole, [*muon]),
        saved=saved_bytes(
            model,
            length,
            bf16=config.loop.precision == "bf16",
            checkpointed=config.model.gradient_checkpointing,
            masked=config.data.document_mask,
        ),
        muon=tuple(muon.values()),
        assumed=tuple(assumed),
    )


def recorded_muon(run: Path) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the matrices that Muon updated in a recorded run, () without Muon."""
    config = parse_config(LMConfig, [f"--config={run / 'config.yaml'}"], program="--measured", summary="")
    with torch.device("meta"):
        model = MoALlamaForCausalLM(model_config(config.model, None, config.data.sequence_length))
    return tuple(_muon_shapes(config, model).values())


def _muon_shapes(config: LMConfig, model: MoALlamaForCausalLM) -> dict[str, tuple[int, ...]]:
    names = hidden_matrices(model) if config.optim.algorithm == "muon" else set()
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if name in names}


def saved_bytes(
    model: MoALlamaConfig, length: int, *, bf16: bool, checkpointed: bool = False, masked: bool = False
) -> SavedBytes:
    """Return the bytes saved for backward by sequences of `length`, traced on models of one and of two layers.

    With gradient checkpointing they are the float32 inputs of all layers and everything of one layer. A `masked` model
    keeps a mask of documents in each layer.
    """
    fields = {"ffn_backend": "eager", "expert_dispatch": "grouped"}  # tracing cannot follow the others

    def traced(layers: int) -> SavedBytes:
        changed = {**fields, "num_hidden_layers": layers, "layer_types": None}
        with torch.device("meta"):
            shallow = MoALlamaForCausalLM(type(model)(**{**model.to_dict(), **changed}))

        def loss(samples: int) -> torch.Tensor:
            tokens = torch.zeros(samples, length, dtype=torch.int64)
            positions = {"position_ids": torch.arange(length).repeat(samples, 1)} if masked else {}
            found = shallow(input_ids=tokens, shift_labels=tokens, skip_logits=True, **positions).loss
            assert found is not None
            return found

        return trace_saved_bytes(shallow, loss, bf16=bf16)

    one, two, layers = traced(1), traced(2), model.num_hidden_layers
    if checkpointed:
        return SavedBytes(one.fixed, one.per_sample + layers * 4 * length * model.hidden_size)
    return SavedBytes(*(a + (layers - 1) * (b - a) for a, b in zip(one, two, strict=True)))
