"""Output of a session, on the main process: startup lines, progress, metrics rows, events, trackers, summary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import torch
from accelerate import Accelerator

from moa_train import devices
from moa_train.checkpoint import TrainState, disk_errors
from moa_train.config import RunConfig, as_tree
from moa_train.environment import describe_environment
from moa_train.plan import TRAINING_FLOPS_PER_FORWARD, describe
from moa_train.progress import Progress, StepTimer, duration
from moa_train.run_folder import RunFolder
from moa_train.schedule import Plan
from moa_train.task import Task
from moa_train.trackers import start_trackers, track


class RunLogger:
    """Log of one session of a run; it updates the times and the memory in `state`."""

    def __init__(self, config: RunConfig, task: Task, plan: Plan, accelerator: Accelerator, state: TrainState) -> None:
        self.config, self.task, self.plan, self.accelerator, self.state = config, task, plan, accelerator, state
        self.device_name = devices.device_name(accelerator.device)
        self.peak_flops = devices.bf16_peak_flops(self.device_name)
        self.flops_per_sample = TRAINING_FLOPS_PER_FORWARD * task.forward_flops_per_sample
        self.folder = RunFolder(config.folder)
        self.main = accelerator.is_main_process
        self.progress = Progress(visible=self.main, step=state.step, total_steps=plan.total_steps)
        self.timer, self.rate_reported = StepTimer(), False
        self._tracking = bool(config.loop.trackers)
        self._window_steps, self._window_s = 0, 0.0  # timed steps since the last row

    def open(self, optimizer: str, warnings: list[str]) -> None:
        """Write the session's files, drop rows of steps that will be repeated, and print the startup lines."""
        device, tree = self.accelerator.device, as_tree(self.config)
        if self.main:
            environment = describe_environment(device, self.plan.world_size)
            self.folder.open(tree, {**environment, "total_steps": self.plan.total_steps})
            self.folder.truncate(self.state.step, self.state.validated)
            with self._tracker_errors():
                if self._tracking:
                    start_trackers(self.accelerator, tree, self.folder.trackers, step=self.state.step)
        self.event("begun", self.state.step, processes=self.plan.world_size, device=self.device_name)
        units = {"unit": self.task.unit, "units_per_sample": self.task.units_per_sample}
        lines = {
            "run": str(self.folder.path),
            "device": (
                f"{self.device_name} x {self.plan.world_size}, {self.config.loop.precision}"
                + (", compiled" if self.config.loop.compile else "")
            ),
            **self.task.startup_lines(),
            "optimizer": optimizer,
            **describe(self.plan, self.flops_per_sample, self.peak_flops, **units, step=self.state.step),
        }
        for title, text in lines.items():
            self.print(f"{title:<11} {text}")
        for warning in warnings:
            self.print(f"warning: {warning}")

    def print(self, text: str) -> None:
        """Print a message above the live line."""
        self.progress.print(text)

    def train_row(self, loss: float, lr: float, grad_norm: float, seconds: float) -> None:
        """Report the step that has just finished; write its row if one is due."""
        step, plan = self.state.step, self.plan
        if self.timer.add(seconds):
            self._window_s += seconds
            self._window_steps += 1
            self.state.timed_s += seconds
            self.state.timed_steps += 1
        self.progress.update(step, plan.epoch(step), loss, lr, self._rate())
        if plan.due(step, self.config.loop.log_every):
            throughput = mfu = None  # warm-up steps have none
            if self._window_steps:
                steps_per_s = self._window_steps / self._window_s
                throughput = steps_per_s * self._units(1)
                mfu = self._utilization(steps_per_s)
            row = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "throughput": throughput, "mfu": mfu}
            self.write("train", step, **{**row, **self._observations()})
            self._window_steps, self._window_s = 0, 0.0

    def _rate(self) -> str:
        """Return throughput and remaining time as text; print them with the peak memory the first time."""
        step_s = self.timer.step_s()
        if step_s is None:
            return "measuring"
        utilization = self._utilization(1 / step_s)
        speed = f"{self._units(1) / step_s:.4g} {self.task.unit}/s"
        speed += "" if utilization is None else f", {utilization:.1%} of peak"
        left = duration((self.plan.total_steps - self.state.step) * step_s)
        if not self.rate_reported:
            self.rate_reported = True
            memory = devices.peak_memory_mib(self.accelerator.device)
            self.print(f"measured    {speed}, peak memory {memory:,.0f} MiB; {left} of training left")
        return f"{speed}, {left} left"

    def _utilization(self, steps_per_s: float) -> float | None:
        """Return the fraction of the devices' bf16 peak, None if it is unknown."""
        if self.peak_flops is None:
            return None
        return steps_per_s * self.plan.global_batch * self.flops_per_sample / (self.peak_flops * self.plan.world_size)

    def _observations(self) -> dict[str, float]:
        """Return the task's observations of the step, averaged over all ranks."""
        found = self.task.observations()
        if not found:
            return {}
        values: Any = self.accelerator.reduce(torch.stack([*found.values()]).float(), "mean")
        return dict(zip(found, values.tolist(), strict=True))

    def val_row(self, losses: dict[str, float]) -> None:
        """Write and print the validation losses of the step that has just finished."""
        step = self.state.step
        self.write("val", step, **losses)
        text = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
        self.print(f"validation  step {step}, epoch {self.plan.epoch(step):.2f}: {text}")

    def eval_row(self, values: dict[str, float]) -> None:
        """Write and print what an evaluator measured after the step that has just finished."""
        step = self.state.step
        self.write("eval", step, **values)
        text = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.print(f"evaluation  step {step}, epoch {self.plan.epoch(step):.2f}: {text}")

    def write(self, kind: str, step: int, **values: float | None) -> None:
        """Append a row to metrics.jsonl and log it to the trackers."""
        place = {"kind": kind, "step": step, "epoch": self.plan.epoch(step), self.task.counter: self._units(step)}
        row = {**place, "wall_s": self.state.wall_s, **values}
        if self.main:
            with disk_errors(str(self.folder.metrics)):
                self.folder.append(row)
        with self._tracker_errors():
            if self._tracking:
                track(self.accelerator, row)

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Append a row to events.jsonl, with the time of day."""
        if self.main:
            time = datetime.now(UTC).isoformat(timespec="seconds")
            with disk_errors(str(self.folder.events)):
                self.folder.append_event({"kind": kind, "step": step, "time": time, **values})

    @contextmanager
    def _tracker_errors(self) -> Iterator[None]:
        """Turn a tracker's OSError into a warning; the run continues without trackers."""
        try:
            yield
        except OSError as error:
            self._tracking = False
            names = ", ".join(self.config.loop.trackers)
            self.print(f"warning: trackers ({names}) failed: {error}; the run continues without them")

    def _units(self, steps: int) -> int:
        """Return the samples or tokens of a number of steps."""
        return steps * self.plan.global_batch * self.task.units_per_sample

    def update_memory(self) -> None:
        """Update the peak memory in the state."""
        used = devices.peak_memory_mib(self.accelerator.device)
        self.state.peak_memory_mib = max(self.state.peak_memory_mib, used)

    def close(self, status: str) -> None:
        """End the live line and write summary.json; `status` is "finished", "stopped" or "failed"."""
        self.progress.close()
        self.event(status, self.state.step)
        if not self.main:
            return
        self.update_memory()
        unit, flops, state = self.task.counter, self.flops_per_sample, self.state
        fields = {
            "name": self.config.name,
            "seed": self.config.seed,
            "status": status,
            "steps": state.step,
            unit: self._units(state.step),
            f"flops_per_{unit.removesuffix('s')}": flops / self.task.units_per_sample,
            "flops_total": flops * state.step * self.plan.global_batch,
            "wall_s": state.wall_s,
            "throughput": self._units(state.timed_steps) / state.timed_s if state.timed_s else None,
            "peak_memory_mib": state.peak_memory_mib,
            "skipped_steps": state.skipped,
            **self.task.summary_fields(),
        }
        with disk_errors("summary.json"):
            self.folder.summarize(fields, self.task.best_by)

    def print_finished(self) -> None:
        """Print the results of a finished run."""
        if not self.main:
            return
        summary = self.folder.summary()
        losses = (summary.get("final") or {"training loss": summary.get("train_loss")}).items()
        final = ", ".join(f"{name} {'nan' if value is None else f'{value:.4f}'}" for name, value in losses)
        steps, throughput = summary["steps"], summary["throughput"]
        training_s = self._units(steps) / throughput if throughput else summary["wall_s"]
        self.print(
            f"finished    {steps} steps, {duration(training_s)} of training: {final}\n"
            f"            {self.folder.path} (to train again, delete it or choose another name)"
        )

    def print_stopped(self, signal: str) -> None:
        """Print that the run was stopped and how to continue it."""
        self.print(
            f"stopped     {signal or 'on another rank'}: saved after step {self.state.step} of "
            f"{self.plan.total_steps}; the same command continues"
        )
