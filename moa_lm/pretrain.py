"""Language-model pre-training: the configuration, the task that `moa_train.trainer` runs, and the command."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from moa_lm.check import tokenizer_problem
from moa_lm.configuration import MoALlamaConfig
from moa_lm.convert import load_weights
from moa_lm.data import TokenBatch, TokenDataConfig, TokenShards, train_loader, val_loader
from moa_lm.diagnostics import save, watch
from moa_lm.encode import load_tokenizer
from moa_lm.flops import forward_flops
from moa_lm.groups import hidden_matrices, no_weight_decay
from moa_lm.loss import IGNORED_LABEL
from moa_lm.modeling import (
    MoACausalLMOutput,
    MoALlamaForCausalLM,
    document_positions,
    labels_within_documents,
)
from moa_lm.sizes import END_OF_TEXT, SIZES, VOCAB_SIZE, count_parameters, named_config, padded_vocab
from moa_train.config import RESUME_MUTABLE_KEYS, RunConfig, ScheduleConfig, parse_config
from moa_train.errors import ConfigError, DataError, require
from moa_train.evaluators import Factory
from moa_train.initialization import init_by_name
from moa_train.progress import count
from moa_train.schedule import Budget, Plan
from moa_train.signals import ignore_stop_signals
from moa_train.task import WEIGHT, DataParallelRank, Task
from moa_train.trainer import check, run

LM_RESUME_MUTABLE_KEYS = {"data.workers", "model.gradient_checkpointing"}
"""Keys of a language-model run that may change on resume, beyond `RESUME_MUTABLE_KEYS`."""

OBSERVED = {"loss": "lm_loss", "aux_loss": "aux_loss", "z_loss": "z_loss"}
"""Columns of the training rows of a model with experts, and the model outputs that they hold. The training loss is
their weighted sum."""

BUDGETS = ("tokens", "tokens_per_parameter", "epochs")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The language model.

    Args:
        size: Named size, see `python -m moa_lm sizes`.
        ffn: Variant of the FFN.
        args: Other fields of MoALlamaConfig, e.g. {ffn_mixing_gate: tanh, num_hidden_layers: 6}.
        gradient_checkpointing: Store only the input of each layer and recompute the rest in the backward pass. With
            experts, `loop.compile` then breaks its graph at each layer.
        init_from: Folder of a model of this package whose weights the run starts from, such as an export or one of
            `python -m moa_lm convert`; size, ffn and args must describe it.
    """

    size: str = "dense-tiny"
    ffn: str = "qdmoa"
    args: dict[str, Any] = field(default_factory=dict)
    gradient_checkpointing: bool = False
    init_from: str | None = None


@dataclass(frozen=True, kw_only=True)
class TokenSchedule(ScheduleConfig):
    """Budget, batch size and learning rate; exactly one of tokens, tokens_per_parameter and epochs is set.

    Args:
        tokens: Training tokens.
        tokens_per_parameter: Training tokens as a multiple of the active parameters of the same model without a
            mixture: embeddings included, unused experts excluded. FFNs that are compared get the same tokens.
        epochs: Passes over the training tokens.
        warmup_steps: Steps over which the learning rate rises linearly from 0.
    """

    tokens: int | None = None
    tokens_per_parameter: float | None = None
    epochs: float | None = None
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        """Check the ranges. Raises ConfigError naming the key."""
        super().__post_init__()
        given = {name: getattr(self, name) for name in BUDGETS if getattr(self, name) is not None}
        if len(given) != 1:
            found = ", ".join(f"schedule.{name} {value}" for name, value in given.items()) or "none"
            raise ConfigError(
                f"schedule needs exactly one of {', '.join(BUDGETS)} (found: {found}); set the others to null"
            )
        for name, value in given.items():
            require(f"schedule.{name}", value, value > 0, "above 0")
        require("schedule.warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "0 or above")

    def budget(self, steps_per_epoch: int, tokens_per_step: int, parameters: int) -> Budget:
        """Return the budget in steps, rounded. Raises ConfigError if the warm-up is longer than the run."""
        if self.epochs is not None:
            steps = self.epochs * steps_per_epoch
        else:
            tokens = self.tokens or (self.tokens_per_parameter or 0) * parameters
            steps = tokens / tokens_per_step
        total = max(1, round(steps))
        allowed = f"at most the run's {total} steps"
        require("schedule.warmup_steps", self.warmup_steps, self.warmup_steps <= total, allowed)
        return Budget(total, self.warmup_steps)


@dataclass(frozen=True, kw_only=True)
class LMConfig(RunConfig):
    """A run of language-model pre-training.

    Args:
        model: The language model.
        data: Token shards and how they become batches.
        schedule: Budget, batch size and learning rate.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: TokenDataConfig
    schedule: TokenSchedule  # pyright: ignore[reportGeneralTypeIssues]  # no default: the budget must be set


class LMTask(Task):
    """A language model on token shards.

    Raises:
        ConfigError: The model or the data does not fit the configuration.
        DataError: Token shards are missing, damaged, or have different tokenizers.
    """

    unit = "tok"
    counter = "tokens"
    val_names: tuple[str, ...] = ("loss",)
    best_by = "loss"

    def __init__(self, config: LMConfig) -> None:
        self.config, self.data = config, config.data
        self.weighted = config.data.document_mask  # otherwise every token has a label
        length = self.data.sequence_length
        self.train_shards = TokenShards(self.data.train)
        self.val_shards = TokenShards(self.data.val) if self.data.val else None
        self.tokenizer = open_tokenizer(self.train_shards)  # opened now, so that the export cannot fail for it
        self.language_model = build_model(config.model, self.train_shards, length, config.seed)
        self.model: nn.Module = self.language_model
        self.parameters = count_parameters(self.language_model.config)
        self.budgeted = budgeted(self.language_model.config, config.model.size)
        self.units_per_sample = length
        self.samples_per_epoch = self.train_shards.windows(length)
        held_out = self.val_shards.windows(length) if self.val_shards else 0
        self.val_samples = held_out if config.loop.val_samples is None else min(held_out, config.loop.val_samples)
        self.forward_flops_per_sample = forward_flops(self.language_model.config, length)
        self._observed: deque[Tensor] = deque(maxlen=1)
        if self.val_shards is not None:
            self.train_shards.require_same_tokenizer(self.val_shards)
            if not held_out:
                raise ConfigError(
                    f"data.val has {self.val_shards.tokens:,} tokens, no more than data.sequence_length {length}; "
                    "use shorter sequences or more text, or null to disable validation"
                )

    def budget(self, steps_per_epoch: int) -> Budget:
        """Return the configured budget in steps."""
        tokens_per_step = self.config.schedule.batch_size * self.units_per_sample
        return self.config.schedule.budget(steps_per_epoch, tokens_per_step, self.budgeted)

    def startup_lines(self) -> dict[str, str]:
        """Return lines to print at the start, by title."""
        model, shards = self.config.model, self.train_shards
        masked = ", attention within documents" if self.data.document_mask else ""
        held_out = self.val_samples * self.units_per_sample
        return {
            "model": f"{model.size} with {model.ffn}; sequences of {self.units_per_sample:,} tokens{masked}",
            "parameters": ", ".join(f"{name} {count(n)}" for name, n in self.parameters._asdict().items()),
            "data": (
                f"{shards.tokens:,} tokens, {shards.bytes_per_token:.2f} bytes per token, vocabulary of "
                f"{shards.vocab_size:,}; {held_out:,} held-out tokens"
            ),
        }

    def summary_fields(self) -> dict[str, Any]:
        """Return parameter counts, and the factor between loss and bits per byte, for summary.json."""
        held_out = self.val_shards or self.train_shards
        return {"parameters": self.parameters._asdict(), "bytes_per_token": held_out.bytes_per_token}

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay."""
        return no_weight_decay(self.language_model)

    def hidden_matrices(self) -> set[str]:
        """Return the names of the parameters that Muon steps."""
        return hidden_matrices(self.language_model)

    def example_batch(self, count: int) -> TokenBatch:
        """Return a made-up batch."""
        tokens = torch.arange(count * (self.units_per_sample + 1)) % self.train_shards.vocab_size
        return TokenBatch(tokens.view(count, -1))

    def train_batches(self, share: DataParallelRank, plan: Plan, start_step: int) -> Iterable[TokenBatch]:
        """Return this rank's micro-batches from `start_step` on."""
        self._observed = deque(maxlen=plan.accumulation)  # the micro-batches of one step
        loader = train_loader(
            self.train_shards,
            self.data,
            seed=self.config.seed,
            global_batch=plan.global_batch,
            micro_batch=plan.micro_batch,
            rank=share.rank,
            world_size=share.world_size,
            start_step=start_step,
            num_steps=plan.total_steps,
        )
        loader.worker_init_fn = ignore_stop_signals
        return loader

    def val_batches(self, share: DataParallelRank) -> Iterable[TokenBatch]:
        """Return this rank's part of the held-out windows, the same at every validation."""
        assert self.val_shards is not None, "called only if val_samples is above 0"
        loader = val_loader(
            self.val_shards,
            self.data,
            batch_size=share.micro_batch,
            rank=share.rank,
            world_size=share.world_size,
            limit=self.val_samples,
        )
        loader.worker_init_fn = ignore_stop_signals
        return loader

    def loss(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """Return the mean training loss of a micro-batch, with experts including the routers' losses."""
        return self._losses(model, batch)[0]

    def items(self, batch: TokenBatch) -> Tensor:
        """Return the number of labels of a micro-batch."""
        return (self._inputs(batch)["shift_labels"] != IGNORED_LABEL).sum()

    def weighted_loss(self, model: nn.Module, batch: TokenBatch, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return `loss` with its cross-entropy multiplied by `weight`, and without gradient `loss` itself.

        The routers' losses are means over sequences, whose number is the same in every micro-batch.
        """
        loss, lm_loss = self._losses(model, batch, weight)
        return loss + (weight - 1) * lm_loss, loss.detach()

    def sample_names(self, batch: TokenBatch) -> list[str]:
        """Return the place of each window in the training stream."""
        return [f"tokens from {window * self.units_per_sample}" for window in batch.windows]

    def observations(self) -> dict[str, Tensor]:
        """Return the parts of the training loss of a model with experts, with the cross-entropy as "loss"."""
        if not self._observed:
            return {}
        return dict(zip(OBSERVED, torch.stack([*self._observed]).mean(dim=0), strict=True))

    def identity(self) -> dict[str, Any]:
        """Return checksums of the tokens and of their tokenizer."""
        shards = {"train": self.train_shards, "val": self.val_shards}
        return {
            name: {"tokens": [shard["sha256"] for shard in own.manifest["shards"]], **own.manifest["tokenizer"]}
            for name, own in shards.items()
            if own is not None
        }

    def val_losses(self, model: nn.Module, batch: TokenBatch) -> dict[str, Tensor]:
        """Return the mean cross-entropy of each sequence in nats, weighted by its labels."""
        inputs = self._inputs(batch)
        output: MoACausalLMOutput = model(**inputs, skip_logits=True)
        assert output.sequence_losses is not None
        return {"loss": output.sequence_losses, WEIGHT: (inputs["shift_labels"] != IGNORED_LABEL).sum(-1)}

    def write_diagnostics(self, model: nn.Module, folder: Path, step: int) -> None:
        """Write mixing coefficients and expert loads on `loop.num_diagnostic_samples` held-out sequences.

        Without held-out tokens training sequences are used, the same at every step.
        """
        assert isinstance(model, MoALlamaForCausalLM)
        shards, count = self.train_shards, self.samples_per_epoch
        if self.val_shards is not None and self.val_samples:
            shards, count = self.val_shards, self.val_samples
        shown, length = min(count, self.config.loop.num_diagnostic_samples), self.units_per_sample
        spread = [number * count // shown for number in range(shown)]
        windows = [torch.from_numpy(shards.window(index, length).astype(np.int64)) for index in spread]
        device = next(model.parameters()).device
        inputs = self._inputs(TokenBatch(torch.stack(windows).to(device)))
        bf16 = self.config.loop.precision == "bf16"  # as in training
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            watched = watch(model, inputs["input_ids"], inputs.get("position_ids"))
        save(watched, folder, step=step)

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write a transformers folder with its tokenizer."""
        assert isinstance(model, MoALlamaForCausalLM)
        logging.disable_progress_bar()
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _losses(self, model: nn.Module, batch: TokenBatch, weight: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """Return training loss and cross-entropy; keep the parts, cross-entropy times `weight`, for the next row."""
        output: MoACausalLMOutput = model(**self._inputs(batch), skip_logits=True)
        assert output.loss is not None and output.lm_loss is not None
        if output.aux_loss is not None:
            parts = {name: getattr(output, field).detach() for name, field in OBSERVED.items()}
            self._observed.append(torch.stack([*(parts | {"loss": parts["loss"] * weight}).values()]))
        return output.loss, output.lm_loss

    def _inputs(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Return the model's arguments: inputs (B, T), labels (B, T), and positions (B, T) with a document mask."""
        inputs, labels = batch.tokens[:, :-1], batch.tokens[:, 1:]
        if not self.data.document_mask:
            return {"input_ids": inputs, "shift_labels": labels}
        end = self.train_shards.end_of_text
        return {
            "input_ids": inputs,
            "shift_labels": labels_within_documents(inputs, labels, end),
            "position_ids": document_positions(inputs, end),
        }


def budgeted(config: MoALlamaConfig, size: str = "") -> int:
    """Return the parameters that `schedule.tokens_per_parameter` multiplies.

    They are the active parameters of the same model without a mixture. A named `size` that widens another one counts
    with the other's width.
    """
    fixed = copy(config)
    if size and SIZES[size].widens:
        fixed.intermediate_size = SIZES[SIZES[size].widens].hidden
    fixed.ffn_variant = "swiglu" if config.ffn_spec().type_two else "relu2"
    return count_parameters(fixed).active


def model_config(config: ModelConfig, shards: TokenShards | None, sequence_length: int) -> MoALlamaConfig:
    """Return the transformers configuration of a model for these tokens, without shards for GPT-2's vocabulary.

    Raises:
        ConfigError: model.args has an unknown field, one that the data decide, or an invalid value.
    """
    vocab_size, end = (VOCAB_SIZE, END_OF_TEXT) if shards is None else (shards.vocab_size, shards.end_of_text)
    given = {
        "vocab_size": padded_vocab(vocab_size),
        "bos_token_id": end,
        "eos_token_id": end,
        "max_position_embeddings": max(2048, sequence_length),
    }
    known = {field.name for field in fields(MoALlamaConfig)}
    for name, value in config.args.items():
        hint = "".join(f"; did you mean {match}?" for match in get_close_matches(name, known, 1))
        require(f"model.args.{name}", value, name in known, f"a field of MoALlamaConfig{hint}")
        if name in given:
            raise ConfigError(f"model.args.{name} is {value!r}, but the data decide it; leave it out")
    try:
        return named_config(config.size, config.ffn, **given, **config.args)
    except ConfigError as error:
        raise ConfigError(f"model.args {config.args}: {error}" if config.args else str(error)) from error


def open_tokenizer(shards: TokenShards) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a set of tokens. Raises DataError if it is damaged or another one."""
    if problem := tokenizer_problem(shards.tokenizer_folder, shards.manifest):
        raise DataError(f"{problem.file}: {problem.text}; copy the tokenizer or make the tokens again")
    return load_tokenizer(shards.tokenizer_folder)


def build_model(config: ModelConfig, shards: TokenShards, sequence_length: int, seed: int) -> MoALlamaForCausalLM:
    """Return the configured model with weights drawn by (seed, name), or those of `model.init_from`.

    Raises:
        ConfigError: The configuration is invalid, or not that of `model.init_from`.
        DataError: `model.init_from` cannot be loaded.
    """
    model = MoALlamaForCausalLM(model_config(config, shards, sequence_length))
    init_by_name(model, seed, model._init_weights)
    if config.init_from is not None and model.device.type != "meta":
        load_weights(model, config.init_from)
    if config.gradient_checkpointing:
        # Renamed in transformers 5.23, where the old name warns.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def main(
    arguments: Sequence[str] | None = None,
    *,
    default: Path | None = None,
    evaluators: Mapping[str, Factory] | None = None,
) -> int:
    """Train as the command line says and return the exit code; `default` is the config file if it names none."""
    config = parse_config(
        LMConfig,
        sys.argv[1:] if arguments is None else arguments,
        program="pretrain_lm.py",
        summary="Pre-train a language model. The same command resumes a run that was stopped.",
        default=default,
        check=lambda config: check(config, partial(LMTask, config), evaluators),
    )
    mutable_keys = RESUME_MUTABLE_KEYS | LM_RESUME_MUTABLE_KEYS
    return run(config, partial(LMTask, config), mutable_keys=mutable_keys, evaluators=evaluators)
