"""What a session tells and writes down: announcement, live line, rows, trackers, summary; on the main process."""

from __future__ import annotations

import errno
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from moa_train import devices
from moa_train.atomic_io import write_text
from moa_train.checkpoint import NotSaved
from moa_train.config import RunConfig, as_tree, flatten
from moa_train.plan import Costs, describe
from moa_train.progress import Progress, StepTimer, duration
from moa_train.run_folder import RunFolder, again, describe_environment
from moa_train.schedule import Plan
from moa_train.spikes import RecentLoss
from moa_train.task import Observed, Task

PROJECT = "mixture-of-activations"
"""Name of the project in trackers."""

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Error numbers with which a write fails for want of space."""


@dataclass
class TrainState:
    """Where a run is; what a checkpoint keeps besides tensors.

    Attributes:
        step: Finished optimizer steps.
        validated: The last step that was validated.
        wall_s: Seconds of training steps, waiting for data included, validation and saving not; all sessions.
        timed_steps: Steps but for each session's warm-up (`moa_train.progress.WARMUP_STEPS`); all sessions.
        timed_s: Their seconds.
        peak_memory_mib: The most memory that any session held.
        skipped: Steps left out because their loss or gradient was not finite.
        spikes: Steps whose loss stood out, see `moa_train.spikes`.
        recent_loss: By which spikes are told.
    """

    step: int = 0
    validated: int = 0
    wall_s: float = 0.0
    timed_steps: int = 0
    timed_s: float = 0.0
    peak_memory_mib: float = 0.0
    skipped: int = 0
    spikes: int = 0
    recent_loss: RecentLoss = field(default_factory=RecentLoss)

    @classmethod
    def of(cls, saved: dict[str, Any]) -> TrainState:
        """Return the state that a checkpoint's JSON holds; what it lacks is as at the start."""
        values = {key: saved[key] for key in asdict(cls()) if key in saved}
        return cls(**{**values, "recent_loss": RecentLoss(**values.get("recent_loss", {}))})


class Journal:
    """The record of one session of a run; `state` is the loop's own, read here and advanced there."""

    def __init__(
        self, config: RunConfig, task: Task, plan: Plan, costs: Costs, accelerator: Accelerator, state: TrainState
    ) -> None:
        self.config, self.task, self.plan, self.costs = config, task, plan, costs
        self.accelerator, self.state = accelerator, state
        self.folder = RunFolder(config.folder)
        self.main = accelerator.is_main_process
        self.progress = Progress(visible=self.main, step=state.step, total_steps=plan.total_steps)
        self.tracking = True
        self.unwritten: set[str] = set()  # for want of space, as was said
        self.timer, self.rate_reported = StepTimer(), False
        self.window_steps, self.window_s = 0, 0.0  # since the last row, but for warm-up steps

    def open(self, optimizer: str, warnings: list[str]) -> None:
        """Write what a session begins with, drop rows of steps that will be run again, and say what will be done."""
        device, tree = self.accelerator.device, as_tree(self.config)
        self.accelerator.wait_for_everyone()  # every process has checked the folder
        if self.main:
            environment = describe_environment(device, self.plan.world_size)
            self.folder.open(tree, {**environment, "total_steps": self.plan.total_steps})
            self.folder.truncate(self.state.step, self.state.validated)
        with self._despite_trackers():
            if self.main and self.config.loop.trackers:
                start_trackers(self.accelerator, tree, self.folder.trackers, step=self.state.step)
        self.event("begun", self.state.step, processes=self.plan.world_size, device=devices.device_name(device))
        how = self.config.loop.precision + (", compiled" if self.config.loop.compile else "")
        lines = {
            "run": str(self.folder.path),
            "device": f"{devices.device_name(device)} x {self.plan.world_size}, {how}",
            **self.task.startup_lines(),
            "optimizer": optimizer,
            **describe(
                self.plan,
                self.costs,
                unit=self.task.unit,
                units_per_sample=self.task.units_per_sample,
                step=self.state.step,
            ),
        }
        for title, text in lines.items():
            self.say(f"{title:<11} {text}")
        for warning in warnings:
            self.say(f"warning: {warning}")

    def say(self, text: str) -> None:
        """Print a message above the live line."""
        self.progress.say(text)

    def train_row(self, loss: float, lr: float, grad_norm: float, seconds: float) -> None:
        """Show the step just finished, which took `seconds`, and write its row if one is due."""
        step, plan = self.state.step, self.plan
        self._note_spike(loss)
        batch = plan.global_batch * self.task.units_per_sample
        if self.timer.add(seconds):
            self.window_s += seconds
            self.window_steps += 1
            self.state.timed_s += seconds
            self.state.timed_steps += 1
        self.progress.update(step, plan.epoch(step), loss, lr, self._rate(batch))
        if plan.due(step, self.config.loop.log_every):
            speed = {"throughput": None, "mfu": None}  # while there are warm-up steps only
            if self.window_steps:
                steps_per_s = self.window_steps / self.window_s
                mfu = self.costs.utilization(steps_per_s * plan.global_batch, plan.world_size)
                speed = {"throughput": steps_per_s * batch, "mfu": mfu}
            row = {"loss": loss, "lr": lr, "grad_norm": grad_norm, **speed}
            self.write("train", step, **{**row, **self._observations()})
            self.window_steps, self.window_s = 0, 0.0

    def _rate(self, batch: int) -> str:
        """Return throughput and time left as text, and report them with the peak memory the first time."""
        step_s = self.timer.step_s()
        if step_s is None:
            return "measuring"
        utilization = self.costs.utilization(self.plan.global_batch / step_s, self.plan.world_size)
        speed = f"{batch / step_s:.4g} {self.task.unit}/s"
        speed += "" if utilization is None else f", {utilization:.1%} of peak"
        left = duration((self.plan.total_steps - self.state.step) * step_s)
        if not self.rate_reported:
            self.rate_reported = True
            memory = devices.peak_memory_mib(self.accelerator.device)
            self.say(f"measured    {speed}, {memory:,.0f} MiB at most; {left} of training left")
        return f"{speed}, {left} left"

    def _note_spike(self, loss: float) -> None:
        usual = self.state.recent_loss.mean
        above = self.state.recent_loss.take(loss)
        if above is not None:
            self.state.spikes += 1
            self.event("spike", self.state.step, loss=loss, recent_loss=usual, deviations=above)
            self.say(
                f"warning: step {self.state.step}: the loss {loss:.4g} stands {above:.1f} standard deviations above "
                f"the recent {usual:.4g}"
            )

    def _observations(self) -> dict[str, float]:
        """What the task has to say of the step, the mean over all processes."""
        found = self.task.observations() if isinstance(self.task, Observed) else {}
        if not found:
            return {}
        values = self.accelerator.reduce(torch.stack([*found.values()]).float(), "mean")
        return dict(zip(found, values.tolist(), strict=True))  # pyright: ignore[reportAttributeAccessIssue]

    def val_row(self, losses: dict[str, float]) -> None:
        """Write and tell the validation losses of the step just finished."""
        step = self.state.step
        self.write("val", step, **losses)
        text = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
        self.say(f"validation  step {step}, epoch {self.plan.epoch(step):.2f}: {text}")

    def write(self, kind: str, step: int, **values: float | None) -> None:
        """Add a row to metrics.jsonl and to the trackers."""
        seen = {self.task.counter: self._units(step)}
        place = {"kind": kind, "step": step, "epoch": self.plan.epoch(step), **seen}
        row = {**place, "wall_s": self.state.wall_s, **values}
        if self.main:
            with self.despite_full_disk(self.folder.metrics.name):
                self.folder.append(row)
        with self._despite_trackers():
            if self.tracking:
                track(self.accelerator, row)

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Add a row to events.jsonl, with the time of day."""
        if self.main:
            time = datetime.now(UTC).isoformat(timespec="seconds")
            with self.despite_full_disk(self.folder.events.name):
                self.folder.append_event({"kind": kind, "step": step, "time": time, **values})

    @contextmanager
    def _despite_trackers(self) -> Iterator[None]:
        """Let the run go on, with a warning and without trackers, where one cannot write."""
        try:
            yield
        except OSError as error:
            self.tracking = False
            names = ", ".join(self.config.loop.trackers)
            self.say(f"warning: trackers ({names}) failed: {error}; the run goes on without them")

    @contextmanager
    def despite_full_disk(self, what: str) -> Iterator[None]:
        """Let the run go on, with one warning, while `what` cannot be written because the disk is full."""
        try:
            yield
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise NotSaved(f"{what} cannot be written: {error}") from error
            if what not in self.unwritten:
                self.unwritten.add(what)
                self.say(f"warning: {what} could not be written: {error}; the run goes on")
        else:
            self.unwritten.discard(what)

    def _units(self, step: int) -> int:
        """Samples or tokens seen in `step` steps."""
        return step * self.plan.global_batch * self.task.units_per_sample

    def note_memory(self) -> None:
        """Bring the state's peak memory up to date."""
        held = devices.peak_memory_mib(self.accelerator.device)
        self.state.peak_memory_mib = max(self.state.peak_memory_mib, held)

    def close(self, status: str) -> None:
        """End the live line and write summary.json; `status` is "finished", "stopped" (asked to) or "failed"."""
        self.event(status, self.state.step)
        self.progress.close()
        if not self.main:
            return
        self.note_memory()
        unit, flops = self.task.counter, self.costs.flops_per_sample
        facts = {
            "name": self.config.name,
            "seed": self.config.seed,
            "status": status,
            "steps": self.state.step,
            unit: self._units(self.state.step),
            f"flops_per_{unit.removesuffix('s')}": flops / self.task.units_per_sample,
            "flops_total": flops * self.state.step * self.plan.global_batch,
            "wall_s": self.state.wall_s,
            "throughput": self._throughput(),
            "peak_memory_mib": self.state.peak_memory_mib,
            "skipped_steps": self.state.skipped,
            "loss_spikes": self.state.spikes,
            **self.task.summary_fields(),
        }
        with self.despite_full_disk("summary.json"):
            self.folder.summarize(facts, self.task.best_by)

    def _throughput(self) -> float | None:
        """Return the units a second of all sessions, warm-up steps left out; None while nothing else was done."""
        return self._units(self.state.timed_steps) / self.state.timed_s if self.state.timed_s else None

    def finished(self) -> bool:
        """Tell whether the run was finished by this or an earlier session."""
        return self.folder.finished_steps() == self.plan.total_steps

    def say_finished(self) -> None:
        """Say what the finished run came to."""
        if self.main:
            summary = self.folder.summary()
            losses = (summary.get("final") or {"training loss": summary.get("train_loss")}).items()
            final = ", ".join(f"{name} {'nan' if value is None else f'{value:.4f}'}" for name, value in losses)
            took = f"{summary.get('steps')} steps, {duration(self._training_s(summary))} of training"
            self.say(
                f"finished    {took}: {final}\n"
                f"            {self.folder.path} (delete it, or choose another name, to run again)"
            )

    def _training_s(self, summary: dict[str, Any]) -> float:
        """Return what all steps take at the run's throughput, as reports have it: without the time of a warm-up."""
        steps, throughput = summary.get("steps"), summary.get("throughput")
        return self._units(steps) / throughput if steps and throughput else summary.get("wall_s") or 0.0

    def say_stopped(self, signal: str, saved_step: int) -> None:
        """Say that the run was asked to stop, and how to continue it; the newest checkpoint is of `saved_step`."""
        newest = f"its newest checkpoint is of step {saved_step}" if saved_step >= 0 else "it has no checkpoint"
        saved = "saved" if saved_step == self.state.step else newest
        self.say(
            f"stopped     {signal or 'another process was asked to stop'}: {saved} after step {self.state.step} of "
            f"{self.plan.total_steps}. The same command continues{again()}"
        )


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError for a name that accelerate does not know or whose package is not installed."""
    available = [str(name) for name in get_available_trackers()]
    known = sorted(tracker.value for tracker in LoggerType if tracker is not LoggerType.ALL)
    for name in names:
        if name not in known:
            raise ValueError(f"loop.trackers names {name!r}; it must be among {', '.join(known)}, or [] for none")
        if name not in available:
            raise ValueError(
                f"loop.trackers names {name!r}, whose package is not installed: pip install {name}, "
                "or leave it out (--loop.trackers [])"
            )


def end_trackers(accelerator: Accelerator) -> None:
    """End the trackers and, with several processes, their group."""
    try:
        accelerator.end_training()
    except OSError as error:  # what they had yet to write; the rows are in metrics.jsonl
        print(f"warning: a tracker could not write its last rows: {error}", file=sys.stderr)


def start_trackers(accelerator: Accelerator, tree: dict[str, Any], folder: Path, *, step: int) -> None:
    """Start the trackers with the configuration `tree`; to be called on the main process.

    All sessions of a run are one run for every tracker that takes an id: it is kept in `folder`, which also gets the
    files of trackers. Rows after `step` from an earlier session are superseded where a tracker can do that.
    """
    values = {key: value if isinstance(value, int | float) else str(value) for key, value in flatten(tree).items()}
    folder.mkdir(parents=True, exist_ok=True)
    options = tracker_options(tree["name"], _tracker_id(folder / "id"), folder, step=step)
    accelerator.init_trackers(PROJECT, config=values, init_kwargs=options)


def tracker_options(name: str, run_id: str, folder: Path, *, step: int) -> dict[str, dict[str, Any]]:
    """Return by tracker what it is started with: `run_id` (32 letters and digits), and its place in `folder`."""
    return {
        "tensorboard": {"purge_step": step + 1},
        "wandb": {"name": name, "id": run_id, "resume": "allow", "dir": str(folder)},
        "swanlab": {
            "experiment_name": name,
            "id": run_id[:21],  # the length that it demands
            "resume": "allow",
            "logdir": str(folder / "swanlog"),
        },
        "trackio": {"name": f"{name}-{run_id[:8]}", "resume": "allow"},  # its id is the name
        "comet_ml": {"experiment_key": run_id, "mode": "get_or_create"},
        "dvclive": {"dir": str(folder / "dvclive"), "dvcyaml": str(folder / "dvc.yaml"), "resume": True},
    }


def _tracker_id(file: Path) -> str:
    """Return the run's id for trackers, made in its first session."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        write_text(file, uuid.uuid4().hex + "\n")
        return _tracker_id(file)


def track(accelerator: Accelerator, row: dict[str, Any]) -> None:
    """Log a metrics row's numbers as e.g. train/loss at its step."""
    values = {f"{row['kind']}/{key}": v for key, v in row.items() if isinstance(v, int | float) and key != "step"}
    accelerator.log(values, step=row["step"])
