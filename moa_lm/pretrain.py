"""Language-model pre-training: configuration, the task that `moa_train.trainer` runs, and the main."""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from moa_lm.check import tokenizer_problems
from moa_lm.configuration import MoALlamaConfig
from moa_lm.data import TokenBatch, TokenDataConfig, TokenShards, train_loader, val_loader
from moa_lm.diagnostics import save_experts, save_mixing, watch
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
from moa_lm.sizes import SIZES, count_parameters, named_config
from moa_lm.token_shards import TokenSettings, make_tokens
from moa_train.config import RESUME_MUTABLE_KEYS, RunConfig, ScheduleConfig, parse_config
from moa_train.errors import DataError, require
from moa_train.progress import count
from moa_train.schedule import Budget, Plan
from moa_train.signals import ignore_stop_signals
from moa_train.task import WEIGHT, DataParallelRank, Task
from moa_train.trainer import check, run

LM_RESUME_MUTABLE_KEYS = {"data.workers", "model.gradient_checkpointing"}
"""Keys of a language model's run that may change when it is resumed."""

VOCAB_MULTIPLE = 64
"""The model's vocabulary is the tokenizer's, padded to a multiple of this, for faster matrix products."""

OBSERVED = {"loss": "lm_loss", "aux_loss": "aux_loss", "z_loss": "z_loss"}
"""Columns of a training row of a model with experts, and the model's outputs that they are; what is trained on is the
weighted sum.
"""

TALES = Path("data/tales")
"""Token shards of the laptop configs; made from the tales that come with this package when they are missing."""

TALES_SOURCE = Path(__file__).parent / "texts" / "tales.jsonl.gz"
TALES_SETTINGS = TokenSettings(train_bpe=2048, val_fraction=0.1)

BUDGETS = ("tokens", "tokens_per_parameter", "epochs")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The language model.

    Args:
        size: A named size, see `python -m moa_lm sizes`.
        ffn: Variant of the FFN.
        args: Any other field of MoALlamaConfig, e.g. {ffn_mixing_gate: tanh, num_hidden_layers: 6}.
        gradient_checkpointing: Keep each layer's input only and compute the rest again in the backward pass. With
            experts, `loop.compile` then cuts its graph at each layer.
    """

    size: str = "dense-tiny"
    ffn: str = "qdmoa"
    args: dict[str, Any] = field(default_factory=dict)
    gradient_checkpointing: bool = False


@dataclass(frozen=True, kw_only=True)
class TokenSchedule(ScheduleConfig):
    """How long, in what batches, at what rate; exactly one of tokens, tokens_per_parameter and epochs is given.

    Args:
        tokens: Training tokens.
        tokens_per_parameter: Training tokens, as a multiple of the parameters that one token passes: embeddings
            included, experts that a token is not sent to and what the mixture adds left out, so that FFNs that are
            compared get the same tokens.
        epochs: Passes over the training tokens.
        warmup_steps: Steps over which the rate rises linearly from 0.
    """

    tokens: int | None = None
    tokens_per_parameter: float | None = None
    epochs: float | None = None
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        """Check the ranges; ValueError names the key."""
        super().__post_init__()
        given = {name: getattr(self, name) for name in BUDGETS if getattr(self, name) is not None}
        if len(given) != 1:
            found = ", ".join(f"schedule.{name} {value}" for name, value in given.items()) or "none"
            raise ValueError(
                f"schedule needs exactly one of {', '.join(BUDGETS)} (found: {found}); set the others to null"
            )
        for name, value in given.items():
            require(f"schedule.{name}", value, value > 0, "above 0")
        require("schedule.warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "0 or above")

    def budget(self, steps_per_epoch: int, tokens_per_step: int, parameters: int) -> Budget:
        """Return the steps that the given budget comes to, the nearest whole number of them.

        Raises:
            ValueError: the warm-up is longer than the run.
        """
        if self.epochs is not None:
            steps = self.epochs * steps_per_epoch
        elif self.tokens is not None:
            steps = self.tokens / tokens_per_step
        else:
            assert self.tokens_per_parameter is not None
            steps = self.tokens_per_parameter * parameters / tokens_per_step
        total = max(1, round(steps))
        allowed = f"at most the run's {total} steps"
        require("schedule.warmup_steps", self.warmup_steps, self.warmup_steps <= total, allowed)
        return Budget(total, self.warmup_steps)


@dataclass(frozen=True, kw_only=True)
class LMConfig(RunConfig):
    """A run of language-model pre-training.

    Args:
        model: The language model.
        data: Where the tokens are and how they become batches.
        schedule: How long, in what batches, at what rate.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: TokenDataConfig
    schedule: TokenSchedule  # pyright: ignore[reportGeneralTypeIssues]  # no default: a budget has to be chosen


class LMTask(Task):
    """A `moa_train.task.Task`: a language model on token shards.

    Raises:
        ValueError: the model or the data cannot be what the configuration says.
        DataError: token shards are missing, damaged, or of different tokenizers.
    """

    unit = "tok"
    counter = "tokens"
    val_names: tuple[str, ...] = ("loss",)
    best_by = "loss"

    def __init__(self, config: LMConfig) -> None:
        self.config, self.data = config, config.data
        self.weighted = config.data.document_mask  # else every token has a label
        length = self.data.sequence_length
        self.train_shards = _opened("train", self.data.train)
        self.val_shards = _opened("val", self.data.val) if self.data.val else None
        self.tokenizer = open_tokenizer(self.train_shards)  # for the export: not found to be missing after days
        self.language_model = build_model(config.model, self.train_shards, length)
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
                raise ValueError(
                    f"data.val has {self.val_shards.tokens:,} tokens, no more than data.sequence_length {length}; "
                    "use shorter sequences or more text, or null for no validation"
                )

    def budget(self, steps_per_epoch: int) -> Budget:
        """Return the steps that the configured budget comes to."""
        tokens_per_step = self.config.schedule.batch_size * self.units_per_sample
        return self.config.schedule.budget(steps_per_epoch, tokens_per_step, self.budgeted)

    def startup_lines(self) -> dict[str, str]:
        """Return lines of the announcement."""
        model, shards = self.config.model, self.train_shards
        length = f"sequences of {self.units_per_sample:,} tokens"
        masked = " that see their own document only" if self.data.document_mask else ""
        held_out = self.val_samples * self.units_per_sample
        return {
            "model": f"{model.size} with {model.ffn}; {length}{masked}",
            "parameters": ", ".join(f"{name} {count(n)}" for name, n in self.parameters._asdict().items()),
            "data": (
                f"{shards.tokens:,} tokens, {shards.bytes_per_token:.2f} bytes each, of a vocabulary of "
                f"{shards.vocab_size:,}; {held_out:,} held out"
            ),
        }

    def summary_fields(self) -> dict[str, Any]:
        """Return parameter counts, and what turns the loss into bits per byte, for summary.json."""
        held_out = self.val_shards or self.train_shards
        return {"parameters": self.parameters._asdict(), "bytes_per_token": held_out.bytes_per_token}

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that are not weights."""
        return no_weight_decay(self.language_model)

    def hidden_matrices(self) -> set[str]:
        """Return the names of the parameters that Muon is for."""
        return hidden_matrices(self.language_model)

    def example_batch(self, count: int) -> TokenBatch:
        """Return a made-up batch."""
        vocabulary = self.train_shards.vocab_size
        tokens = torch.arange(count * (self.units_per_sample + 1)) % vocabulary
        return TokenBatch(tokens.view(count, -1))

    def train_batches(self, share: DataParallelRank, plan: Plan, start_step: int) -> Iterable[TokenBatch]:
        """Yield this process's micro-batches from `start_step` on."""
        self._observed = deque(maxlen=plan.accumulation)  # of one step
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
        """Yield this process's share of the held-out windows, the same ones every time."""
        return self._held_out(share.micro_batch, share.rank, share.world_size, self.val_samples)

    def loss(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """Return the mean loss of a micro-batch: the next token's, and with experts the routers' too."""
        return self._losses(model, batch)[0]

    def items(self, batch: TokenBatch) -> Tensor:
        """Return the labels of a micro-batch."""
        return (self._inputs(batch)["shift_labels"] != IGNORED_LABEL).sum()

    def weighted_loss(self, model: nn.Module, batch: TokenBatch, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return `loss` with the next token's part times `weight`, and `loss` itself, without gradient.

        The routers' losses are means over sequences, of which all micro-batches have as many.
        """
        loss, lm_loss = self._losses(model, batch, weight)
        return loss + (weight - 1) * lm_loss, loss.detach()

    def sample_names(self, batch: TokenBatch) -> list[str]:
        """Return where in the training stream the batch's windows begin."""
        return [f"tokens from {window * self.units_per_sample}" for window in batch.windows]

    def observations(self) -> dict[str, Tensor]:
        """Return the parts of the training loss of a model with experts, the language model's as "loss"."""
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
        """Return each sequence's mean cross-entropy in nats."""
        inputs = self._inputs(batch)
        output: MoACausalLMOutput = model(**inputs, skip_logits=True)
        assert output.sequence_losses is not None
        return {"loss": output.sequence_losses, WEIGHT: (inputs["shift_labels"] != IGNORED_LABEL).sum(-1)}

    def write_diagnostics(self, model: nn.Module, folder: Path, step: int) -> None:
        """Note how the tokens of a few held-out sequences mix, and which experts they go to.

        Without held-out tokens they are sequences of the training tokens, the same each time.
        """
        shards, count = self.train_shards, self.samples_per_epoch
        if self.val_shards is not None and self.val_samples:
            shards, count = self.val_shards, self.val_samples
        shown, length = min(count, self.config.loop.num_diagnostic_samples), self.units_per_sample
        assert isinstance(model, MoALlamaForCausalLM)
        spread = [number * count // shown for number in range(shown)]  # over documents of all kinds
        windows = [torch.from_numpy(shards.window(index, length).astype(np.int64)) for index in spread]
        device = next(model.parameters()).device
        inputs = self._inputs(TokenBatch(torch.stack(windows).to(device)))
        half = self.config.loop.precision == "bf16"  # as in training
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            watched = watch(model, inputs["input_ids"], inputs.get("position_ids"))
        save_mixing(watched, folder / "mixing", step=step)
        save_experts(watched, folder / "experts", step=step)

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write a transformers folder, tokenizer included."""
        logging.disable_progress_bar()
        assert isinstance(model, MoALlamaForCausalLM)
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _losses(self, model: nn.Module, batch: TokenBatch, weight: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """Return the training loss and the language model's; note the latter, times `weight`, for a row."""
        output: MoACausalLMOutput = model(**self._inputs(batch), skip_logits=True)
        assert output.loss is not None and output.lm_loss is not None
        if output.aux_loss is not None:
            parts = {name: getattr(output, field).detach() for name, field in OBSERVED.items()}
            self._observed.append(torch.stack([*(parts | {"loss": parts["loss"] * weight}).values()]))
        return output.loss, output.lm_loss

    def _inputs(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Return the model's arguments: inputs (B, T), labels (B, T) from one token on, positions if needed."""
        inputs, labels = batch.tokens[:, :-1], batch.tokens[:, 1:]
        if not self.data.document_mask:
            return {"input_ids": inputs, "shift_labels": labels}
        end = self.train_shards.end_of_text
        return {
            "input_ids": inputs,
            "shift_labels": labels_within_documents(inputs, labels, end),
            "position_ids": document_positions(inputs, end),
        }

    def _held_out(self, batch_size: int, rank: int, world_size: int, limit: int) -> Iterator[TokenBatch]:
        assert self.val_shards is not None, "asked for only where val_samples is above 0"
        loader = val_loader(
            self.val_shards, self.data, batch_size=batch_size, rank=rank, world_size=world_size, limit=limit
        )
        loader.worker_init_fn = ignore_stop_signals
        return iter(loader)


def budgeted(config: MoALlamaConfig, size: str = "") -> int:
    """Return the parameters that `schedule.tokens_per_parameter` multiplies: those that a token passes in the same
    model without a mixture, and of a named `size` that widens another, in that other's width.
    """
    fixed = copy(config)
    if size and SIZES[size].widens:
        fixed.intermediate_size = SIZES[SIZES[size].widens].hidden
    fixed.ffn_variant = "swiglu" if config.ffn_spec().type_two else "relu2"
    return count_parameters(fixed).active


def model_config(config: ModelConfig, shards: TokenShards, sequence_length: int) -> MoALlamaConfig:
    """Return the transformers configuration of a model for these tokens. Raises ValueError."""
    given = {
        "vocab_size": -(-shards.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        "bos_token_id": shards.end_of_text,
        "eos_token_id": shards.end_of_text,
        "max_position_embeddings": max(2048, sequence_length),
    }
    return checked_config(config, given)


def checked_config(config: ModelConfig, given: dict[str, Any]) -> MoALlamaConfig:
    """Return the transformers configuration with the fields `given`, over which model.args win. Raises ValueError."""
    known = {field.name for field in fields(MoALlamaConfig)}
    for name in config.args:
        close = get_close_matches(name, known, 1)
        require(f"model.args.{name}", config.args[name], name in known, f"a field of MoALlamaConfig{_meant(close)}")
    with _possible(config):
        return named_config(config.size, config.ffn, **given, **config.args)


@contextlib.contextmanager
def _possible(config: ModelConfig) -> Iterator[None]:
    """Say that model.args cannot be, whatever transformers' and torch's constructors raise for them."""
    try:
        yield
    except (StrictDataclassError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"model.args {config.args}: {reason}") from error


def _opened(key: str, folder: str) -> TokenShards:
    try:
        return TokenShards(folder)
    except RuntimeError as error:  # the home of nobody
        raise ValueError(f"data.{key} is {folder!r}, which cannot be read ({error})") from error


def _meant(close: list[str]) -> str:
    return f"; did you mean {close[0]}?" if close else ""


def open_tokenizer(shards: TokenShards) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a set of tokens was made with. Raises DataError if it is not that one."""
    for problem in tokenizer_problems(shards.tokenizer_folder, shards.manifest):
        raise DataError(f"{problem.file}: {problem.text}; copy the tokenizer, or make the tokens, again")
    return load_tokenizer(shards.tokenizer_folder)


def build_model(config: ModelConfig, shards: TokenShards, sequence_length: int) -> MoALlamaForCausalLM:
    """Return the model of a configuration, initialized from torch's generator. Raises ValueError."""
    with _possible(config):
        model = MoALlamaForCausalLM(model_config(config, shards, sequence_length))
    if config.gradient_checkpointing:
        # transformers 5.23 renamed it; the old name warns there.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def build_task(config: LMConfig) -> LMTask:
    """Return the task; where it wants the tales and their shards are missing, make these first."""
    if tales_are_missing(config.data):
        TALES.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{TALES}.lock"):  # of several runs that start at the same time, one makes them
            if tales_are_missing(config.data):
                print(f"making token shards of the tales that come with moa_lm in {TALES}")
                make_tokens([str(TALES_SOURCE)], TALES, TALES_SETTINGS)
    return LMTask(config)


def tales_are_missing(data: TokenDataConfig) -> bool:
    """Whether the data are the demo's tales, whose shards `build_task` has yet to make."""
    wanted = {Path(folder) for folder in (data.train, data.val) if folder}
    return any(not (folder / "manifest.json").exists() for folder in wanted & {TALES / "train", TALES / "val"})


def check_config(config: LMConfig) -> None:
    """Raise ValueError for a model that cannot be built, data that are not there, or a batch or budget that cannot
    be.
    """
    if tales_are_missing(config.data):
        checked_config(config.model, {})
        return
    check(config, partial(LMTask, config))


def main(arguments: Sequence[str] | None = None, *, default: Path | None = None) -> int:
    """Train as the command line says and return the exit code of `moa_train.trainer.run`; `default` is the config file
    read when the command line names none.
    """
    config = parse_config(
        LMConfig,
        sys.argv[1:] if arguments is None else arguments,
        program="pretrain_lm.py",
        summary="Pre-train a language model. The same command continues a run that was stopped.",
        default=default,
        check=check_config,
    )
    return run(
        config,
        partial(build_task, config),
        mutable_keys=RESUME_MUTABLE_KEYS | LM_RESUME_MUTABLE_KEYS,
    )
