"""Run configs: frozen dataclasses, and their parser for YAML files and command-line overrides."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, cast, get_args, get_type_hints

import yaml
from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser, Namespace

from moa_train.errors import ConfigError, DataError, require, wait_for_local_rank_0
from moa_train.reading import differing_keys as differing_keys
from moa_train.reading import flatten, read_yaml
from moa_train.schedule import Budget, DecayType

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer settings.

    Args:
        algorithm: adamw, or muon: Muon for hidden matrices and AdamW for all other parameters.
        lr: Peak learning rate, absolute (no scaling by the batch).
        betas: AdamW's decay rates of the two moments.
        eps: AdamW's epsilon.
        weight_decay: Decoupled weight decay, for weights with two or more dimensions.
        fused: Use the fused AdamW kernel where the device has one.
        momentum: Muon's Nesterov momentum.
        muon_scale: Scale of Muon's orthogonalized update of a matrix (A, B). match_rms_adamw: 0.2 sqrt(max(A, B)), the
            size of AdamW's usual update, so that a learning rate tuned for AdamW fits (arXiv:2502.16982). original:
            sqrt(max(1, A / B)).
        adamw_lr_scale: With muon, the learning rate of AdamW's parameters as a multiple of lr.
        max_grad_norm: Largest global gradient norm; null disables clipping.
    """

    algorithm: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    fused: bool = True
    momentum: float = 0.95
    muon_scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    adamw_lr_scale: float = 1.0
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges; raise ConfigError naming the key."""
        require("optim.lr", self.lr, self.lr > 0, "above 0")
        require("optim.betas", self.betas, all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)")
        require("optim.eps", self.eps, self.eps > 0, "above 0")
        require("optim.weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or above")
        require("optim.momentum", self.momentum, 0 <= self.momentum < 1, "in [0, 1)")
        require("optim.adamw_lr_scale", self.adamw_lr_scale, self.adamw_lr_scale > 0, "above 0")
        clips = self.max_grad_norm is None or self.max_grad_norm > 0
        require("optim.max_grad_norm", self.max_grad_norm, clips, "above 0, or null")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Batch size and learning rate schedule; subclasses add the length.

    Args:
        min_lr: Learning rate at the end.
        batch_size: Global batch of one optimizer step, in samples, the same on any number of devices.
        decay_fraction: Fraction of all steps over which the learning rate decays, at the end of the run; before the
            decay it stays at the peak (warmup-stable-decay). 1 decays from the end of the warm-up.
        decay_type: Shape of the decay: half a cosine, linear, or 1 - sqrt of the progress.
    """

    min_lr: float = 0.0
    batch_size: int = 64
    decay_fraction: float = 1.0
    decay_type: DecayType = "cosine"

    def __post_init__(self) -> None:
        """Check the ranges; raise ConfigError naming the key."""
        require("schedule.min_lr", self.min_lr, self.min_lr >= 0, "0 or above")
        require("schedule.batch_size", self.batch_size, self.batch_size >= 1, "1 or above")
        require("schedule.decay_fraction", self.decay_fraction, 0 <= self.decay_fraction <= 1, "from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class EpochSchedule(ScheduleConfig):
    """Length, batch size and learning rate schedule.

    Args:
        epochs: Passes over the training set.
        warmup_epochs: Epochs of linear warm-up from 0, updated every step.
    """

    epochs: float = 1.0
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges; raise ConfigError naming the key."""
        super().__post_init__()
        require("schedule.epochs", self.epochs, self.epochs > 0, "above 0")
        warmup = 0 <= self.warmup_epochs <= self.epochs
        require("schedule.warmup_epochs", self.warmup_epochs, warmup, f"from 0 to schedule.epochs ({self.epochs})")

    def budget(self, steps_per_epoch: int) -> Budget:
        """Return the number of steps of the run and of its warm-up."""
        return Budget(max(1, round(self.epochs * steps_per_epoch)), round(self.warmup_epochs * steps_per_epoch))


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Training loop settings; intervals are in optimizer steps, and the last step is always due.

    Args:
        micro_batch_size: Samples of one forward and backward pass on one device; the rest is accumulated.
        precision: float32, or bf16 autocast over float32 weights.
        compile: Compile the model with torch.compile.
        log_every: Steps between training rows in metrics.jsonl.
        val_every: Steps between validations on the held-out samples.
        val_samples: Held-out samples of each validation; null uses all of them.
        num_diagnostic_samples: Held-out samples (without any, a language model's training sequences) for diagnostics
            (reconstructions, mixing, expert load) every `val_every` steps; 0 disables them.
        max_nonfinite_steps: Number of steps with a non-finite loss or gradient that a run may skip; one more ends the
            run.
        world_size: Required number of processes on all machines together; null accepts any.
        trackers: Names of accelerate's trackers, e.g. tensorboard, wandb; [] disables them. A resumed run continues
            the same W&B run. Their files are in the run folder, in trackers.
    """

    micro_batch_size: int = 64
    precision: Literal["float32", "bf16"] = "float32"
    compile: bool = False
    log_every: int = 10
    val_every: int = 500
    val_samples: int | None = None
    num_diagnostic_samples: int = 8
    max_nonfinite_steps: int = 0
    world_size: int | None = None
    trackers: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        """Check the ranges; raise ConfigError naming the key."""
        for name in ("micro_batch_size", "log_every", "val_every"):
            require(f"loop.{name}", getattr(self, name), getattr(self, name) >= 1, "1 or above")
        for name in ("num_diagnostic_samples", "max_nonfinite_steps"):
            require(f"loop.{name}", getattr(self, name), getattr(self, name) >= 0, "0 or above")
        fixed = self.world_size is None or self.world_size >= 1
        require("loop.world_size", self.world_size, fixed, "1 or above, or null")
        samples = self.val_samples is None or self.val_samples >= 1
        require("loop.val_samples", self.val_samples, samples, "1 or above, or null")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoint settings; intervals are in optimizer steps, and the last step is always due.

    Args:
        interval: Steps between checkpoints. They are written while training continues.
        keep_latest: Number of newest checkpoints to keep.
        keep_interval: Steps between checkpoints that are kept permanently, a multiple of interval; null keeps none.
    """

    interval: int = 500
    keep_latest: int = 2
    keep_interval: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges; raise ConfigError naming the key."""
        for name in ("interval", "keep_latest"):
            require(f"checkpoint.{name}", getattr(self, name), getattr(self, name) >= 1, "1 or above")
        kept = self.keep_interval is None or (self.keep_interval >= 1 and self.keep_interval % self.interval == 0)
        multiple = f"a multiple of checkpoint.interval ({self.interval}), or null"
        require("checkpoint.keep_interval", self.keep_interval, kept, multiple)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of every run; vision and language runs add their model and data.

    Args:
        name: Name of the run; its folder is out/name.
        seed: Seed of the weights, the order of the data and every augmentation.
        out: Folder of all runs.
        resume: auto continues an existing run; never refuses to; force continues even if other keys have changed.
        start_from: Checkpoint of another run (RUN/checkpoints/step_XXXXXXXX) to start from instead of new weights:
            weights, optimizer, position in the data and step. A warmup-stable-decay run can be decayed from any of its
            stable checkpoints in this way.
        optim: Optimizer settings.
        schedule: Length, batch size and learning rate schedule.
        loop: Training loop settings.
        checkpoint: Checkpoint settings.
    """

    name: str = "run"
    seed: int = 0
    out: str = "runs"
    resume: Literal["auto", "never", "force"] = "auto"
    start_from: str | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        """Check the fields; raise ConfigError naming the key."""
        plain = bool(re.fullmatch(r"[\w.+-]+", self.name)) and self.name not in (".", "..")
        require("name", self.name, plain, "a folder name of letters, digits and . _ + -")
        require("seed", self.seed, 0 <= self.seed < 2**31, "from 0 to 2147483647")
        low = self.schedule.min_lr <= self.optim.lr
        require("schedule.min_lr", self.schedule.min_lr, low, f"at most optim.lr ({self.optim.lr})")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.out) / self.name

    def gentler(self) -> tuple[str, ...]:
        """Return command-line options, alternatives to each other, that make a diverged run more stable."""
        clip = 1.0 if self.optim.max_grad_norm is None else min(1.0, self.optim.max_grad_norm / 2)
        return f"--optim.lr {self.optim.lr / 2:.3g}", f"--optim.max_grad_norm {clip:.3g}"


RESUME_MUTABLE_KEYS = frozenset(
    {"out", "resume"}
    | {f"loop.{key}" for key in ("micro_batch_size", "compile", "log_every", "val_every", "num_diagnostic_samples")}
    | {f"loop.{key}" for key in ("max_nonfinite_steps", "world_size", "trackers")}
    | {f"checkpoint.{key}" for key in ("interval", "keep_latest", "keep_interval")}
)
"""Keys that may change when a run is resumed: they do not change what is trained."""

START_FROM_MUTABLE_KEYS = frozenset(
    {"name", "start_from"}
    | {f"schedule.{key}" for key in ("epochs", "warmup_epochs", "tokens", "tokens_per_parameter", "warmup_steps")}
    | {f"schedule.{key}" for key in ("min_lr", "decay_fraction", "decay_type")}
)
"""Further keys that may differ between a run and the one whose checkpoint it starts from."""

RENAMED_KEYS = {
    "loop.save_every": "checkpoint.interval",
    "loop.keep": "checkpoint.keep_latest",
    "loop.keep_every": "checkpoint.keep_interval",
    "loop.processes": "loop.world_size",
    "loop.skip_nonfinite": "loop.max_nonfinite_steps",
    "loop.visualize": "loop.num_diagnostic_samples",
    "optim.clip_grad": "optim.max_grad_norm",
    "schedule.decay_shape": "schedule.decay_type",
    "data.repeats": "data.repeated_augmentation",
    "data.window_shards": "data.shuffle_window_shards",
    "model.args.ffn_gate": "model.args.ffn_mixing_gate",
    "model.encoder_args.ffn_gate": "model.encoder_args.ffn_mixing_gate",
}
"""Keys of configs before 0.1.0 and their current names. An old key is an error that names the new one."""


def parse_config(
    kind: type[Config],
    arguments: Sequence[str],
    *,
    program: str,
    summary: str,
    default: Path | None = None,
    plain: Mapping[str, dict[str, Any]] | None = None,
    check: Callable[[Config], object] | None = None,
) -> Config:
    """Parse command-line arguments into a config dataclass.

    `--config FILE` (several are layered in order) and `--KEY.SUBKEY VALUE` set values, and later ones win. `--help`
    prints the keys, `--print_config` the values as given; `--check` validates the config and prints all values. Each
    of the three exits with code 0.

    Args:
        kind: The dataclass.
        arguments: Words of the command line.
        program, summary: Name and purpose of the program, for --help and messages.
        default: Config file to read when the command line names none.
        plain: Fields of `kind` that are ordinary arguments instead of keys: arguments of `add_argument` by "name"
            (positional) or "--name", e.g. {"run": {"type": str, "help": "..."}}.
        check: Further checks of `--check`; raises ConfigError or DataError.

    Raises:
        SystemExit: Code 2 after a message on stderr that names the key, file or value at fault; code 0 as above.
    """
    parser = _parser(kind, program, summary, default, plain or {})
    words = list(arguments)
    if default is not None and not any(word.split("=")[0] == "--config" for word in words):
        words.insert(0, f"--config={default}")
    try:
        _check_renamed((word.partition("=")[0].removeprefix("--") for word in words), "the command line")
        namespace = parser.parse_args(_with_config_texts(words))
        del namespace["config"]
        checking = namespace.pop("check", False)
        _check_null(kind, namespace)
        config = kind(**parser.instantiate(namespace).as_dict())
        if checking and check is not None:
            check(config)
    except (ArgumentError, ConfigError, DataError) as error:
        _exit(parser, str(error))
    if checking:
        print(yaml.safe_dump(as_tree(config), sort_keys=False), end="")
        raise SystemExit(0)
    return config


def _parser(
    kind: type, program: str, summary: str, default: Path | None, plain: Mapping[str, dict[str, Any]]
) -> ArgumentParser:
    words = "".join(
        f"{options.get('metavar', name.upper())}{' ...' if options.get('nargs') == '+' else ''} "
        for name, options in plain.items()
        if not name.startswith("-")
    )
    usage = f"%(prog)s {words}[--config FILE] [--KEY.SUBKEY VALUE ...]"
    parser = ArgumentParser(prog=program, usage=usage, description=summary, exit_on_error=False, allow_abbrev=False)
    fallback = "" if default is None else f" (default: {default.name})"
    parser.add_argument("--config", action="config", help=f"YAML file; keys given after it override it{fallback}")
    parser.add_argument(
        "--check",
        action="store_true",
        default=SUPPRESS,
        help="validate config, model and data, print all values, and exit",
    )
    for name, options in plain.items():
        parser.add_argument(name, **options)
    parser.add_class_arguments(kind, skip={name.removeprefix("--") for name in plain})
    return parser


def read_config(path: Path) -> dict[str, Any]:
    """Return the keys of a YAML config merged over those of its `base`: a file, or several, relative to the config.

    Raises:
        ConfigError: A key was renamed, or a file is its own base.
        DataError: A file is missing or is not a YAML mapping.
    """
    return _read_over_bases(path, ())


def _read_over_bases(path: Path, derived: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in derived:
        raise ConfigError(f"{path}: base leads back to this file; remove the cycle")
    tree = read_yaml(path, "--config takes YAML files of keys with values", empty=True)
    _check_renamed(flatten(tree), str(path))
    bases = tree.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: base={bases!r} must be a file name or a list of file names")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _merge(merged, _read_over_bases(path.parent / base, (*derived, path.resolve())))
    return _merge(merged, tree)


def _merge(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: _merge(old.get(key), value) for key, value in new.items()}


def _with_config_texts(words: Sequence[str]) -> list[str]:
    """Replace each config file by its keys, merged over its bases, as YAML text."""
    replaced: list[str] = []
    for word in words:
        if word.startswith("--config="):
            replaced.append(f"--config={_config_text(word.removeprefix('--config='))}")
        else:
            replaced.append(_config_text(word) if replaced[-1:] == ["--config"] else word)
    return replaced


def _config_text(file: str) -> str:
    return yaml.safe_dump(read_config(Path(file)), sort_keys=False)


def _check_renamed(keys: Iterable[str], source: str) -> None:
    """Raise ConfigError for a key of `RENAMED_KEYS`."""
    for key in keys:
        if key in RENAMED_KEYS:
            raise ConfigError(f"{source}: {key} was renamed to {RENAMED_KEYS[key]}")


def _check_null(kind: type, namespace: Namespace, prefix: str = "") -> None:
    """Raise ConfigError for null and for a group that is no mapping, which jsonargparse accepts everywhere."""
    hints = get_type_hints(kind)
    for key in dataclasses.fields(kind):
        if key.name not in namespace:
            continue  # a plain argument
        name, hint, value = f"{prefix}{key.name}", hints[key.name], namespace[key.name]
        if dataclasses.is_dataclass(hint):
            require(name, value, isinstance(value, Namespace), "keys with values")
            _check_null(cast(type, hint), value, f"{name}.")
        elif value is None:
            require(name, value, hint is Any or type(None) in get_args(hint), getattr(hint, "__name__", str(hint)))


def _exit(parser: ArgumentParser, message: str) -> NoReturn:
    """Print a message, with the key that was probably meant, on local rank 0; exit with code 2."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        wait_for_local_rank_0()
        raise SystemExit(2)
    keys = [str(action.dest) for action in parser._actions]
    unknown = re.search(r"unrecognized arguments: --([\w.]+)|'([\w.]+)' is not accepted|option '([\w.]+)'", message)
    if unknown:
        wrong = next(filter(None, unknown.groups()))
        by_tail = {key.rpartition(".")[2]: key for key in keys}
        close = get_close_matches(wrong, keys, 1) or [by_tail[k] for k in get_close_matches(wrong, by_tail, 1)]
        message += f"; did you mean {close[0]}?" if close else ""
    parser.exit(2, f"{parser.prog}: error: {message.strip()}\nAll keys: {parser.prog} --help\n")
    raise AssertionError("parser.exit returned")


def as_tree(config: Any) -> dict[str, Any]:
    """Return a config dataclass as nested dicts of JSON types (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
