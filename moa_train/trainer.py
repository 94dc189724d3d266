"""The training loop: learning rate -> micro-batches -> finite check -> update -> row -> validation -> checkpoint."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device, set_seed
from torch import Tensor

from moa_train import checkpoint, distributed
from moa_train.atomic_io import new_folder
from moa_train.checkpoint import (
    Generators,
    SaveError,
    Saver,
    TrainState,
    disk_errors,
    get_generators,
    set_generators,
)
from moa_train.config import RESUME_MUTABLE_KEYS, RunConfig, as_tree
from moa_train.data_order import worker_died
from moa_train.distributed import on_main_process, sum_over_ranks, total_norm
from moa_train.errors import DataError, ReportedError, RunError, report
from moa_train.evaluation import evaluating, validation_losses
from moa_train.evaluators import Evaluator, Factory, build_evaluators
from moa_train.optim import describe_groups, set_rate
from moa_train.resume import Start, find_start
from moa_train.run_folder import RunFolder
from moa_train.run_logger import RunLogger
from moa_train.schedule import make_plan
from moa_train.signals import EXIT_STOPPED, StopRequests
from moa_train.task import DataParallelRank, Task
from moa_train.trackers import check_trackers, end_trackers


class NonFiniteError(RunError):
    """A loss, gradient or weight that is not finite; the message names the step and the remedies."""

    on_all_ranks = True


def run(
    config: RunConfig,
    build_task: Callable[[], Task],
    *,
    mutable_keys: frozenset[str] = RESUME_MUTABLE_KEYS,
    evaluators: Mapping[str, Factory] | None = None,
) -> int:
    """Train to the end of the schedule or to a stop request; return the exit code.

    0: finished. 1: failed (non-finite loss, full disk, killed data worker). 2: config, data or run folder cannot be
    used. `EXIT_STOPPED` (75): stopped on request and saved; the same command continues. Errors with these codes are
    printed in one line; all others are raised. The task is built once the devices are known and the seed is set.
    """
    with StopRequests() as stop, contextlib.ExitStack() as cleanup:
        stop.exit_at_once = True
        try:
            check_trackers(config.loop.trackers)
            accelerator = distributed.start(config.loop, config.folder / "trackers")
            cleanup.callback(end_trackers, accelerator)
            set_seed(config.seed)
            with accelerator.local_main_process_first():
                task = build_task()
            chosen = build_evaluators(config, task, evaluators or {})
            trainer = Trainer(config, task, accelerator, stop, cleanup, mutable_keys, chosen)
            stop.exit_at_once = False
            return trainer.run()
        except ReportedError as error:
            return report(error)
        except (RuntimeError, OSError, EOFError) as error:
            if (died := worker_died(error)) is None:
                raise
            return report(died)


def check(config: RunConfig, build_task: Callable[[], Task], evaluators: Mapping[str, Factory] | None = None) -> None:
    """Raise the ConfigError or DataError with which `run` would refuse this config on one device.

    The task is built on torch's "meta" device. Nothing is written, and the run folder is not read.
    """
    check_trackers(config.loop.trackers)
    with torch.device("meta"):
        task = build_task()
    make_plan(config, task.samples_per_epoch, task.budget, world_size=1)
    build_evaluators(config, task, evaluators or {})


class Trainer:
    """One session of a run; it continues from the run's newest checkpoint. `cleanup` releases the run folder.

    Raises:
        ConfigError: The batch cannot be split, or the folder holds another run or is in use.
        DataError: The run's files or data cannot be used.
        RunError: The run folder cannot be read or written.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        accelerator: Accelerator,
        stop: StopRequests,
        cleanup: contextlib.ExitStack,
        mutable_keys: frozenset[str] = RESUME_MUTABLE_KEYS,
        evaluators: Sequence[Evaluator] = (),
    ) -> None:
        self.evaluators = evaluators
        self.config, self.task, self.accelerator, self.stop = config, task, accelerator, stop
        self.device, self.main = accelerator.device, accelerator.is_main_process
        self.folder = RunFolder(config.folder)
        self.plan = make_plan(config, task.samples_per_epoch, task.budget, accelerator.num_processes)
        micro_batch = config.loop.micro_batch_size
        self.rank = DataParallelRank(accelerator.process_index, accelerator.num_processes, micro_batch)

        self.bare = task.model.to(self.device)
        self.distributed = distributed.DistributedModel(self.bare, accelerator, compiled=config.loop.compile)
        self.model = self.distributed.model
        self.optimizer = task.optimizer(config.optim)

        kept = {"keep_latest": config.checkpoint.keep_latest, "keep_interval": config.checkpoint.keep_interval}
        self.saver = Saver(self.folder.checkpoints, **kept)
        self.identity = task.identity()
        self.start: Start = on_main_process(accelerator, lambda: self._open_folder(cleanup, mutable_keys))
        self.state, self.generators = self._load_start()
        self.saving_step = self.state.step if self.start.own else -1  # step of the last checkpoint that was begun
        self.logger = RunLogger(config, task, self.plan, accelerator, self.state)

    def run(self) -> int:
        """Train and export; return the exit code."""
        if self.start.finished:
            self.logger.print_finished()
            return 0
        try:
            with disk_errors("the run folder"):
                self.logger.open(describe_groups(self.optimizer), self.start.warnings)
            finished = self.train()
            if finished:
                self._export()
        except BaseException:
            self._record_failure()
            raise
        self.logger.close("finished" if finished else "stopped")
        self.accelerator.wait_for_everyone()  # srun ends all ranks once one has ended with 75
        if finished:
            self.logger.print_finished()
            return 0
        self.logger.print_stopped(self.stop.received)
        return EXIT_STOPPED

    def _record_failure(self) -> None:
        try:
            with contextlib.suppress(SaveError):
                self.logger.close("failed")
        except RuntimeError as error:
            if worker_died(error) is None:
                raise
            self._record_failure()  # torch's signal handler raised the death of a data worker in here

    def train(self) -> bool:
        """Take the remaining steps; return False if a stop request ended them early."""
        batches = iter(self.task.train_batches(self.rank, self.plan, self.state.step))
        set_generators(self.generators, self.device)  # after the loader, which may draw from them when it starts
        self.bare.train()
        proceed = self._validate_if_due()
        while proceed and self.state.step < self.plan.total_steps:
            self.train_step(batches)
            proceed = self._validate_if_due()
            if proceed:
                self._evaluate_if_due()
            last = not proceed or self.state.step == self.plan.total_steps
            if last or self.state.step % self.config.checkpoint.interval == 0:
                self._save(get_generators(self.device), wait=last)
        return proceed

    def train_step(self, batches: Iterator[Any]) -> None:
        """Take one optimizer step on the next global batch; skip it if its loss or gradient is not finite."""
        begin, generators = time.perf_counter(), get_generators(self.device)
        lr = self.plan.lr_at(self.state.step)

        total_loss = torch.zeros((), device=self.device)
        micro_batches: list[tuple[Tensor, list[str]]] = []  # loss and sample names
        for index, (batch, weight) in enumerate(self._micro_batches(batches)):
            self.distributed.set_gradient_sync(index == self.plan.accumulation - 1)
            if weight is None:
                loss = self.task.loss(self.model, batch)
                micro_batches.append((loss.detach(), self.task.sample_names(batch)))
            else:
                loss, own_mean = self.task.weighted_loss(self.model, batch, weight)
                micro_batches.append((own_mean, self.task.sample_names(batch)))
            loss = loss / self.plan.accumulation
            self.accelerator.backward(loss)
            total_loss += loss.detach()
        loss = float(self._reduce(total_loss, "mean"))
        grad_norm = total_norm(p.grad for p in self.bare.parameters() if p.grad is not None)

        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            if self.config.optim.max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.bare.parameters(), self.config.optim.max_grad_norm, grad_norm)
            set_rate(self.optimizer, lr)
            self.optimizer.step()
        else:
            self._skip(loss, float(grad_norm), lr, micro_batches, generators)
        self.optimizer.zero_grad()
        self.state.step += 1

        seconds = time.perf_counter() - begin
        self.state.wall_s += seconds
        if finite:
            self.logger.train_row(loss, lr, float(grad_norm), seconds)

    def _micro_batches(self, batches: Iterator[Any]) -> Iterator[tuple[Any, Tensor | None]]:
        """Yield the micro-batches of a step, on the device, with their loss weights if the task is weighted."""
        count = self.plan.accumulation
        step = (send_to_device(next(batches), self.device, non_blocking=True) for _ in range(count))
        if not self.task.weighted:
            yield from ((batch, None) for batch in step)
            return
        loaded = list(step)
        items = torch.stack([self.task.items(batch) for batch in loaded])
        weights = items * (count * self.plan.world_size) / self._reduce(items.sum(), "sum").clamp_min(1)
        yield from zip(loaded, weights, strict=True)

    def _reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return self.accelerator.reduce(tensor, reduction)  # pyright: ignore[reportReturnType]

    def _skip(
        self,
        loss: float,
        grad_norm: float,
        lr: float,
        micro_batches: list[tuple[Tensor, list[str]]],
        before: Generators,
    ) -> None:
        """Record a step without an update and its samples.

        Raises NonFiniteError, after saving the state `before` the step, if `loop.max_nonfinite_steps` is exceeded.
        """
        self._require_finite_weights()
        step, allowed = self.state.step + 1, self.config.loop.max_nonfinite_steps
        skipped = self.state.skipped < allowed
        values = {"loss": loss, "lr": lr, "grad_norm": grad_norm}
        own = [
            {"rank": self.rank.rank, "loss": value if math.isfinite(value) else None, "samples": names}
            for value, names in ((float(loss), names) for loss, names in micro_batches)
        ]
        self.logger.event("nonfinite", step, **values, skipped=skipped, micro_batches=gather_object(own))
        what = f"step {step}: the loss is {loss} and the gradient norm {grad_norm} at lr {lr:.3g}"
        if not skipped:
            self.logger.write("train", step, **values)
            self._save(before, wait=True)
            raise NonFiniteError(
                f"{what}; the state before this step is saved, and {self.folder.events} lists its samples. Continue "
                f"with --loop.max_nonfinite_steps {allowed + 1}, or with --resume force and a lower learning rate"
            )
        self.state.skipped += 1
        self.logger.print(
            f"warning: {what}; step skipped, {self.state.skipped} of {allowed} (loop.max_nonfinite_steps)"
        )

    def _require_finite_weights(self) -> None:
        """Raise NonFiniteError if the weights are not finite: no later step mends them, and they are never saved."""
        norm = float(total_norm(parameter.detach() for parameter in self.bare.parameters()))
        if not math.isfinite(norm):
            self.logger.event("nonfinite_weights", self.state.step)
            raise NonFiniteError(
                f"the weights are not finite after step {self.state.step}; they are not saved. Continue from the last "
                "checkpoint with --resume force and a lower learning rate, or remove it to continue from an earlier one"
            )

    def _validate_if_due(self) -> bool:
        """Validate and write diagnostics if due; return False on all ranks once one was asked to stop.

        A stop request interrupts a validation; the next session repeats it.
        """
        if any(sum_over_ranks(self.accelerator, bool(self.stop.received))):
            return False
        step, task = self.state.step, self.task
        if not self.plan.due(step, self.config.loop.val_every) or self.state.validated >= step:
            return True
        losses: dict[str, float] | None = {}
        with evaluating(self.distributed, self.device):
            if task.val_samples:
                losses = validation_losses(task, self.distributed, self.rank, self.accelerator, self.stop)
            if losses is None:
                return False
            if self.config.loop.num_diagnostic_samples:
                with self.distributed.whole() as model:
                    if model is not None:
                        with disk_errors("diagnostics"):
                            task.write_diagnostics(model, self.folder.path, step)
        if losses:
            self.logger.val_row(losses)
        elif task.val_samples:
            self.logger.print("warning: no held-out sample could be used; this step has no validation loss")
        self.state.validated = step
        return True

    def _evaluate_if_due(self) -> None:
        """Run the evaluators that are due after this step, on the main process with the whole model."""
        due = [evaluator for evaluator in self.evaluators if self.plan.due(self.state.step, evaluator.interval)]
        if not due:
            return
        with evaluating(self.distributed, self.device), self.distributed.whole() as model:
            for evaluator in due if model is not None else ():
                bare = self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
                values = {f"{evaluator.name}/{name}": value for name, value in evaluator.evaluate(bare)}
                self.logger.eval_row(values)

    def _save(self, generators: Generators, *, wait: bool) -> None:
        """Save the finished steps in the background, with this rank's `generators`.

        With `wait`, the checkpoint is complete on return, on all ranks. Raises SaveError if this checkpoint, with
        `wait`, or the one before cannot be written.
        """
        if self.saving_step != self.state.step:
            self._require_finite_weights()
            self.saving_step = self.state.step
            self.logger.update_memory()
            gathered = checkpoint.gather_generators(generators, self.accelerator)
            tensors = checkpoint.snapshot(self.bare, self.optimizer, gathered, main=self.main)
            on_main_process(self.accelerator, lambda: self.saver.begin(self._saved_state(), tensors))
        if wait:
            on_main_process(self.accelerator, self.saver.wait)

    def _saved_state(self) -> dict[str, Any]:
        return {
            **asdict(self.state),
            "world_size": self.plan.world_size,
            "global_batch": self.plan.global_batch,
            "stable": self.plan.is_stable(self.state.step),
            "identity": self.identity,
            "config": as_tree(self.config),
        }

    def _open_folder(self, cleanup: contextlib.ExitStack, mutable_keys: frozenset[str]) -> Start:
        """Lock the run folder until `cleanup` and find the start of this session."""
        with disk_errors("the run folder"):
            self.folder.path.mkdir(parents=True, exist_ok=True)
            cleanup.enter_context(self.folder.lock())
            cleanup.callback(self.saver.close)  # before the lock is released
            checkpoint.remove_leftovers(self.folder.checkpoints)
        return find_start(self.config, self.plan, self.identity, mutable_keys)

    def _load_start(self) -> tuple[TrainState, Generators]:
        """Load the session's checkpoint; return progress and generator states."""
        state, generators = TrainState(), Generators()
        if self.start.checkpoint is not None:
            if not self.start.checkpoint.exists():
                raise DataError(f"{self.start.checkpoint} is missing on this machine; all must see the same run folder")
            state, everyones = checkpoint.load(self.start.checkpoint, self.bare, self.optimizer)
            generators = checkpoint.generators_of(everyones, self.rank.rank)
        # A rank without saved generators, because the world size has grown, keeps these.
        set_seed(self.config.seed + state.step, device_specific=True)
        return state, generators

    def _export(self) -> None:
        with self.distributed.whole() as model:
            if model is None:
                return
            model = self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            with disk_errors("the export"), new_folder(self.folder.path / "export") as folder:
                self.task.export(model.eval(), folder)
