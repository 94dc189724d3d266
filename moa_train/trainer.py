"""The only training loop: lr -> micro-batches -> finite check -> step -> record -> validate -> save."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device, set_seed
from safetensors import SafetensorError
from torch import Tensor

from moa_train import checkpoint, distributed, resume
from moa_train.atomic_io import new_folder
from moa_train.checkpoint import (
    Generators,
    NotSaved,
    Saver,
    Unreadable,
    get_generators,
    of_all_processes,
    of_process,
    set_generators,
)
from moa_train.config import RESUME_MUTABLE_KEYS, RunConfig, as_tree
from moa_train.data_order import worker_died
from moa_train.errors import ConfigError, DataError
from moa_train.failures import Together
from moa_train.optim import build_optimizer, describe_groups, set_rate
from moa_train.plan import Costs, measure_costs
from moa_train.run_folder import RunFolder, RunInUse, again
from moa_train.run_logger import Journal, TrainState, check_trackers, end_trackers
from moa_train.schedule import make_plan
from moa_train.signals import EXIT_STOPPED, StopRequests
from moa_train.task import WEIGHT, DataParallelRank, HiddenMatrices, Identified, Named, OwnOptimizer, Task, Weighted
from moa_train.torch_internals import WorkerError


class NonFiniteError(Exception):
    """A loss or gradient is not finite; the message says at which step and how to continue."""


def run(
    config: RunConfig,
    build_task: Callable[[], Task],
    *,
    mutable_keys: frozenset[str] = RESUME_MUTABLE_KEYS,
) -> int:
    """Train to the end of the plan, or as far as a stop request lets it; return the process's exit code.

    0: finished. 1: a loss or gradient was not finite, the data failed, or the disk is full. 2: configuration, data or
    run folder do not fit. `EXIT_STOPPED` (75): asked to stop, saved; the same command continues. Failures are told in
    one message. A process that is asked to stop before training ends within this call, at once, with 75.

    Args:
        config: The configuration.
        build_task: Called once the devices are known and the seed is set.
        mutable_keys: Keys that may change between sessions of a run.
    """
    with StopRequests() as stop, contextlib.ExitStack() as cleanup, Together() as together:
        try:
            with stop.at_once(together.stop):
                check_trackers(config.loop.trackers)
                accelerator = distributed.start(config.loop, config.folder / "trackers")
                cleanup.callback(end_trackers, accelerator)
                together.watch(accelerator)
                set_seed(config.seed)
                with accelerator.local_main_process_first():
                    task = build_task()
                trainer = Trainer(config, task, accelerator, stop, cleanup, mutable_keys)
        except (ValueError, OSError, RunInUse) as error:
            return together.fail(error, 2)
        except (NotSaved, Unreadable) as error:
            return together.fail(error, 1)
        try:
            with contextlib.closing(trainer.journal.progress):
                return trainer.run()
        except Exception as error:
            error = _close_failed(trainer, error)
            if (died := worker_died(error)) is not None:
                return together.fail(died, 1)
            if not isinstance(error, (NonFiniteError, NotSaved, WorkerError, ConfigError, DataError)):
                raise
            return together.fail(error, 1)


def _close_failed(trainer: Trainer, error: Exception) -> Exception:
    """Record that the run failed; return the error to report.

    torch raises the death of a loader's worker in a signal handler, wherever the main thread is, here included.
    """
    try:
        with contextlib.suppress(OSError, NotSaved):  # what could not be written before may not be now
            trainer.journal.close("failed")
    except RuntimeError as other:
        if worker_died(other) is None:
            raise
        return _close_failed(trainer, other)
    return error


def check(config: RunConfig, build_task: Callable[[], Task]) -> None:
    """Raise the ValueError, or the task's own error, with which `run` would refuse the configuration anywhere.

    The task is built without weights (on torch's "meta" device), nothing is written, and the run folder is not looked
    at. What depends on the number of devices is left to `run`.
    """
    check_trackers(config.loop.trackers)
    with torch.device("meta"):
        task = build_task()
    make_plan(config, task.samples_per_epoch, task.budget, world_size=1)


class Trainer:
    """One session of a run; it takes the run up where its folder left it, and holds the folder until `held` ends.

    Raises:
        ValueError: the batch cannot be split, or the folder holds another run.
        RunInUse: another process holds the folder.
        NotSaved: the folder cannot be written to.
        Unreadable: a checkpoint cannot be read now.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        accelerator: Accelerator,
        stop: StopRequests,
        held: contextlib.ExitStack,
        mutable_keys: frozenset[str] = RESUME_MUTABLE_KEYS,
    ) -> None:
        self.config, self.task, self.accelerator, self.stop = config, task, accelerator, stop
        self.mutable_keys = mutable_keys
        self.identity = task.identity() if isinstance(task, Identified) else None
        self.weighted = task if isinstance(task, Weighted) and task.weighted else None
        self.device = accelerator.device
        self.folder = RunFolder(config.folder)
        self.changed = self._check_folder()
        self.plan = make_plan(config, task.samples_per_epoch, task.budget, accelerator.num_processes)
        self.share = DataParallelRank(
            accelerator.process_index, accelerator.num_processes, config.loop.micro_batch_size
        )

        self.bare = task.model.to(self.device)
        self.costs = self._measure_costs()
        self.spread = distributed.DistributedModel(self.bare, accelerator, compiled=config.loop.compile)
        self.model = self.spread.model
        self.optimizer = self._build_optimizer()

        self.state, self.generators, self.begun_saving = TrainState(), Generators(), -1
        beside = (self.folder.metrics, self.folder.events)
        kept = {"keep": config.checkpoint.keep_latest, "keep_every": config.checkpoint.keep_interval}
        self.saver = Saver(self.folder.checkpoints, **kept, beside=beside)
        self.micro_batches: list[tuple[Tensor, list[str]]] = []  # of the step at hand: losses, names of the samples
        self._take_folder(held)
        self.warnings = self._resume()
        self.begun_at = self.state.step
        self.warnings += [f"continuing with another value of {message}" for message in self.changed]
        self.journal = Journal(config, task, self.plan, self.costs, accelerator, self.state)

    def _build_optimizer(self) -> torch.optim.Optimizer:
        if isinstance(self.task, OwnOptimizer):
            return self.task.optimizer(self.config.optim)
        hidden = self._hidden_matrices()
        return build_optimizer(self.bare, self.config.optim, self.task.no_weight_decay(), hidden)

    def _hidden_matrices(self) -> Collection[str] | None:
        return self.task.hidden_matrices() if isinstance(self.task, HiddenMatrices) else None

    def _measure_costs(self) -> Costs:
        def loss(batch: Any) -> Tensor:
            with self.accelerator.autocast():
                return self.task.loss(self.bare, send_to_device(batch, self.device))

        by_muon = self._hidden_matrices() if self.config.optim.algorithm == "muon" else None
        flops = self.task.forward_flops_per_sample
        costs = measure_costs(self.bare, loss, self.task.example_batch, flops, by_muon or ())
        shards = self.plan.world_size if distributed.shards_wanted() else 1
        return replace(costs, state_bytes=costs.state_bytes // shards)

    def run(self) -> int:
        """Announce, train, export; return the exit code."""
        if self.journal.finished():
            self.journal.say_finished()
            return 0
        with self._writing_to_folder():
            self.journal.open(describe_groups(self.optimizer), self.warnings)
        if not self.train():
            self.journal.close("stopped")
            self.journal.say_stopped(self.stop.received, self.saver.saved_step)
            return EXIT_STOPPED
        self._export()
        self.journal.close("finished")
        self.journal.say_finished()
        return 0

    def _check_folder(self) -> list[str]:
        return self.folder.check(as_tree(self.config), self.config.resume, self.mutable_keys)

    def _take_folder(self, held: contextlib.ExitStack) -> None:
        """Keep other processes from running this run, before its checkpoints are looked at, until `held` ends."""
        if self.accelerator.is_main_process:
            with self._writing_to_folder():
                self.folder.path.mkdir(parents=True, exist_ok=True)
                held.enter_context(self.folder.held())
                checkpoint.remove_leftovers(self.folder.checkpoints)
            held.callback(self.saver.close)  # nobody else may have the folder before
            self.changed = self._check_folder()  # again: whoever held it may have begun another run in it

    @contextlib.contextmanager
    def _writing_to_folder(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise NotSaved(f"the run folder cannot be written to: {error}") from error

    def train(self) -> bool:
        """Run the steps left; return True at the end of the plan, False if asked to stop, and saved, before."""
        batches = iter(self.task.train_batches(self.share, self.plan, self.state.step))
        set_generators(self.generators, self.device)  # after the loader, which may draw from them as it starts
        self.bare.train()
        going = self._go_on() and self._validate_if_due()
        while going and self.state.step < self.plan.total_steps:
            self._keep_up_with_saving()
            begin, generators = time.perf_counter(), get_generators(self.device)
            lr = self.plan.lr_at(self.state.step)
            loss, gradients = self._accumulate(batches)
            grad_norm = distributed.total_norm(gradients)
            finite = math.isfinite(loss) and math.isfinite(grad_norm)
            if finite:
                self._update(lr, grad_norm)
            else:
                self._leave_out(float(loss), float(grad_norm), lr, generators)
            seconds = time.perf_counter() - begin
            self.state.wall_s += seconds
            if finite:
                self.journal.train_row(float(loss), lr, float(grad_norm), seconds)
            going = self._go_on() and self._validate_if_due()
            last = not going or self.state.step == self.plan.total_steps
            if last or self._saving_is_due():
                saved = self._save(get_generators(self.device), wait=last)
                if last and not saved:
                    raise NotSaved("the last checkpoint could not be written; make room, the same command continues")
            self._tell_of_saving(wait=False)
        return going

    def _saving_is_due(self) -> bool:
        return self.state.step % self.config.checkpoint.interval == 0 or self._is_halfway()

    def _is_halfway(self) -> bool:
        every = self.config.checkpoint.interval
        return every > 1 and self.state.step % every == every // 2

    def _keep_up_with_saving(self) -> None:
        """Wait for a checkpoint that is being written if, without it, a crash in the next step would lose too much.

        It has half of `save_every` steps to be written in before anybody waits.
        """
        if self.accelerator.is_main_process:
            safe = max(self.saver.saved_step, self.begun_at)
            if self.state.step - safe >= self.config.checkpoint.interval:
                self._tell_of_saving(wait=True)

    def _accumulate(self, batches: Iterator[Any]) -> tuple[Tensor, list[Tensor]]:
        """Add up one global batch's gradients; return its mean loss over all processes, and the gradients."""
        total = torch.zeros((), device=self.device)
        self.micro_batches.clear()
        countdown = reversed(range(self.plan.accumulation))
        for left, (batch, weight) in zip(countdown, self._of_a_step(batches), strict=True):
            with self.spread.no_sync() if left else contextlib.nullcontext():
                loss, own = self._loss(batch, weight)
                loss = loss / self.plan.accumulation
                self.accelerator.backward(loss)
            total += loss.detach()
            names = self.task.sample_names(batch) if isinstance(self.task, Named) else []
            self.micro_batches.append((own, names))
        gradients = [parameter.grad for parameter in self.bare.parameters() if parameter.grad is not None]
        return self.accelerator.reduce(total, "mean"), gradients  # pyright: ignore[reportReturnType]

    def _of_a_step(self, batches: Iterator[Any]) -> Iterator[tuple[Any, Tensor | None]]:
        """Yield the next step's micro-batches, on the device, each with its weight if the task is `Weighted`."""
        count = self.plan.accumulation
        step = (send_to_device(next(batches), self.device, non_blocking=True) for _ in range(count))
        if self.weighted is None:
            yield from ((batch, None) for batch in step)
            return
        taken = list(step)
        items = torch.stack([self.weighted.items(batch) for batch in taken])
        everyones = self.accelerator.reduce(items.sum(), "sum")
        weights = items * (count * self.plan.world_size) / everyones.clamp_min(1)  # pyright: ignore[reportAttributeAccessIssue]
        yield from zip(taken, weights, strict=True)

    def _loss(self, batch: Any, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the loss of a micro-batch as its step counts it, and without gradient its own mean."""
        if self.weighted is not None and weight is not None:
            return self.weighted.weighted_loss(self.model, batch, weight)
        loss = self.task.loss(self.model, batch)
        return loss, loss.detach()

    def _leave_out(self, loss: float, grad_norm: float, lr: float, generators: Generators) -> None:
        """Pass over a step whose loss or gradient is not finite, nothing updated, and note its samples.

        Raises NonFiniteError, the state before the step saved, if that was one more than `loop.max_nonfinite_steps`.
        """
        self._require_finite_weights()
        step, skipped = self.state.step + 1, self.state.skipped
        skips = skipped < self.config.loop.max_nonfinite_steps
        values = {"loss": loss, "lr": lr, "grad_norm": grad_norm}
        self.journal.event("nonfinite", step, **values, skipped=skips, micro_batches=self._everyones_micro_batches())
        what = f"step {step}: the loss is {loss} and the gradient norm {grad_norm}, at lr {lr:.3g}"
        if not skips:
            saved = self._save(generators, wait=True)
            self.journal.write("train", step, **values)
            raise NonFiniteError(self._how_to_continue(what, saved))
        self.optimizer.zero_grad()
        self.state.step += 1
        self.state.skipped += 1
        allowed = self.config.loop.max_nonfinite_steps
        self.journal.say(f"warning: {what}; left out, {skipped + 1} of {allowed} (loop.max_nonfinite_steps)")

    def _require_finite_weights(self) -> None:
        """Raise NonFiniteError if the weights themselves are not finite: no step mends that, and none is saved."""
        norm = float(distributed.total_norm(parameter.detach() for parameter in self.bare.parameters()))
        if math.isfinite(norm):
            return
        step = self.state.step
        self.journal.event("nonfinite_weights", step)
        what = f"the weights are not finite after step {step} (their norm is {norm})"
        if step == self.begun_at:
            raise NonFiniteError(f"{what}, as the run found them; begin with another checkpoint, this one moved away")
        raise NonFiniteError(
            f"{what}. They are not saved: what is in {self.folder.checkpoints} is from before. Continue from there "
            "with a lower rate, or with clipped gradients" + again(*self._gentler_options())
        )

    def _everyones_micro_batches(self) -> list[dict[str, Any]]:
        """Return rank, loss and names of the samples of every micro-batch of the step; to be called by all processes.

        A loss that is not finite is null, as in every row.
        """
        losses = [float(loss) for loss, _ in self.micro_batches]
        own = [
            {"rank": self.share.rank, "loss": loss if math.isfinite(loss) else None, "samples": names}
            for loss, (_, names) in zip(losses, self.micro_batches, strict=True)
        ]
        return gather_object(own)

    def _how_to_continue(self, what: str, saved: bool) -> str:
        beside = f"--loop.max_nonfinite_steps {self.state.skipped + 1}"
        state = f"{'is' if saved else 'could NOT be'} saved in {self.folder.checkpoints}"
        return (
            f"{what}. Nothing was updated; the state before this step {state}, and {self.folder.events} lists its "
            "samples. Continue without this step, with a lower rate, or with clipped gradients"
            + again(beside, *self._gentler_options())
        )

    def _gentler_options(self) -> list[str]:
        return [f"--resume force {option}" for option in self.config.gentler()]

    def _update(self, lr: float, grad_norm: Tensor) -> None:
        if self.config.optim.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.bare.parameters(), self.config.optim.max_grad_norm, grad_norm)
        set_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.step += 1

    def _validate_if_due(self) -> bool:
        """Validate, and look at samples closely, if due and not done yet.

        Without held-out samples only the latter. Return False if a stop request cut it short: resuming then does it.
        """
        step = self.state.step
        if not self.plan.due(step, self.config.loop.val_every) or self.state.validated >= step:
            return True
        with self._evaluating():
            losses = self._validation_losses() if self.task.val_samples else {}
            if losses is None:
                return False
            if self.config.loop.num_diagnostic_samples:
                self._visualize(step)
        if losses:
            self.journal.val_row(losses)
        elif self.task.val_samples:
            self.journal.say("warning: no held-out sample could be used; there is no validation loss of this step")
        self.state.validated = step
        return True

    def _visualize(self, step: int) -> None:
        with self.spread.whole() as model:
            if model is not None:  # on the main process
                with self.journal.despite_full_disk("a picture or a note of what the model does"):
                    self.task.write_diagnostics(model, self.folder.path, step)

    def _validation_losses(self) -> dict[str, float] | None:
        """Return the held-out losses, averaged over samples, all processes together; none if no sample could be used.

        None if a stop request came.
        """
        batches = iter(self.task.val_batches(self.share))
        seen = self.task.example_batch(1)
        sums = torch.zeros(1 + len(self.task.val_names), dtype=torch.float64)  # weights, then each loss
        while True:
            batch = next(batches, None)
            stop, more = self._sum_over_processes(bool(self.stop.received), batch is not None)
            if stop:
                return None
            if not more:
                break
            mine = batch is not None  # else only other processes have some left
            if not (mine or self.spread.sharded):
                continue
            seen = batch if mine else seen  # in shards, every process takes part in every forward pass
            losses = self.task.val_losses(self.bare, send_to_device(seen, self.device, non_blocking=True))
            if mine:
                values = torch.stack([losses[name] for name in self.task.val_names]).cpu().double()
                weights = losses[WEIGHT].cpu().double() if WEIGHT in losses else torch.ones(values.shape[1]).double()
                sums += torch.cat([weights.sum()[None], values @ weights])
        whole, *totals = self._sum_over_processes(*sums.tolist())
        if not whole:
            return {}
        return {name: total / whole for name, total in zip(self.task.val_names, totals, strict=True)}

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode, no gradients, and generators that training finds again as it left them."""
        generators = get_generators(self.device)
        self.bare.eval()
        with torch.no_grad():
            yield
        self.spread.rest()
        self.bare.train()
        set_generators(generators, self.device)

    def _go_on(self) -> bool:
        """Return False on every process once any of them was asked to stop."""
        return not any(self._sum_over_processes(bool(self.stop.received)))

    def _sum_over_processes(self, *values: float) -> list[float]:
        if self.plan.world_size == 1:
            return list(values)
        device_values = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self.accelerator.reduce(device_values, "sum").tolist()  # pyright: ignore[reportAttributeAccessIssue]

    def _save(self, generators: Generators, *, wait: bool) -> bool:
        """Begin a checkpoint of the finished steps, unless there is one; `generators` are this process's.

        It is written while training goes on. With `wait` it is there on return, or was tried twice; return whether it
        is, as far as known.
        """
        if self.begun_saving != self.state.step:
            self._begin_saving(generators, passing=self._is_halfway() and not wait)
        if not wait:
            return True
        if not self._is_saved():
            self._begin_saving(generators)
        return self._is_saved()

    def _begin_saving(self, generators: Generators, *, passing: bool = False) -> None:
        self._tell_of_saving(wait=True)  # one at a time
        self._require_finite_weights()
        self.begun_saving = self.state.step
        self.journal.note_memory()
        everyones = of_all_processes(generators, self.accelerator)
        main = self.accelerator.is_main_process
        tensors = checkpoint.snapshot(self.bare, self.optimizer, everyones, main=main)
        if main:
            self.saver.begin(self._saved_state(), tensors, passing=passing)

    def _is_saved(self) -> bool:
        """Wait for the last checkpoint; return on every process whether it is one of the finished steps."""
        self._tell_of_saving(wait=True)
        missing = self.accelerator.is_main_process and self.saver.saved_step != self.state.step
        return not any(self._sum_over_processes(missing))

    def _saved_state(self) -> dict[str, Any]:
        return {
            **asdict(self.state),
            "world_size": self.plan.world_size,
            "global_batch": self.plan.global_batch,
            "stable": self.plan.is_stable(self.state.step),
            "identity": self.identity,
            "config": as_tree(self.config),
        }

    def _tell_of_saving(self, *, wait: bool) -> None:
        """Warn if the last checkpoint could not be written; the run goes on with the one before."""
        failed = self.saver.outcome(wait=wait)
        if failed is not None:
            newest = f"step {self.saver.saved_step}" if self.saver.saved_step >= 0 else "none yet"
            self.journal.event("not_saved", self.begun_saving, reason=str(failed))
            self.journal.say(f"warning: {failed}; the run goes on (newest checkpoint: {newest}). Make room on the disk")

    def _resume(self) -> list[str]:
        """Take the newest valid checkpoint, if there is one; return what should be known of that."""
        newest, source, damaged = resume.choose(self.config, self.plan, self.accelerator, self.mutable_keys)
        warnings = [f"passed over a damaged checkpoint: {message}" for message in damaged]
        if source is not None:
            resume.check_fit(source, self.config, self.identity)
            saved, generators = checkpoint.load(source, self.bare, self.optimizer)
            self.state = TrainState.of(saved)
            self.generators = of_process(generators, self.accelerator.process_index)
            warnings += self._other_batch(saved)
        if newest is not None:
            self.begun_saving = self.saver.saved_step = self.state.step
        if self.state.step > self.plan.total_steps:
            raise ValueError(f"{source} is past the end of this configuration, step {self.plan.total_steps}")
        # Every process has its own random numbers; one without a saved state (it was not there before) keeps these.
        set_seed(self.config.seed + self.state.step, device_specific=True)
        return warnings

    def _other_batch(self, saved: dict[str, Any]) -> list[str]:
        then, now = saved.get("global_batch", self.plan.global_batch), self.plan.global_batch
        told = f"its steps took {then} samples each, these take {now}: some samples are read again, or left out"
        return [told] if then != now else []

    def _export(self) -> None:
        with self.spread.whole() as model:
            if model is not None:  # on the main process
                self._write_export(self.accelerator.unwrap_model(model, keep_fp32_wrapper=False))
        self.accelerator.wait_for_everyone()

    def _write_export(self, model: torch.nn.Module) -> None:
        try:
            with new_folder(self.folder.path / "export") as folder:
                self.task.export(model.eval(), folder)
        except (OSError, SafetensorError) as error:
            raise NotSaved(
                f"the trained model could not be exported: {error}. Its last checkpoint is in "
                f"{self.folder.checkpoints}; the same command exports it"
            ) from error
