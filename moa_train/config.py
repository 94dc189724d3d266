"""YAML files and dotted overrides -> frozen dataclasses; an unknown key or a wrong type is an error that names it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, cast, get_args, get_type_hints

import yaml
from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser, Namespace

from moa_train.errors import ConfigError, require
from moa_train.reading import check_shape, read_yaml
from moa_train.schedule import Budget, DecayType

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer.

    Args:
        algorithm: adamw, or muon: Muon for hidden matrices, AdamW for everything else.
        lr: Peak learning rate, absolute (no scaling by the batch).
        betas: AdamW's decay rates of the two moments.
        eps: AdamW's epsilon.
        weight_decay: Decoupled weight decay, for weights with two or more dimensions.
        fused: One fused AdamW kernel where the device has it.
        momentum: Muon's (Nesterov).
        muon_scale: What multiplies Muon's orthogonalized update of a matrix (A, B). match_rms_adamw: 0.2 sqrt(max(A,
            B)), the size of AdamW's usual update, so that a rate tuned for AdamW fits (arXiv:2502.16982). original:
            sqrt(max(1, A / B)).
        adamw_lr_scale: With muon, the rate of the parameters that AdamW steps, as a multiple of lr.
        max_grad_norm: Largest global gradient norm; null leaves gradients as they are.
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
        """Check the ranges; ValueError names the key."""
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
    """In what batches, at what rate; a subclass says how long.

    Args:
        min_lr: Learning rate at the end.
        batch_size: Global batch of one optimizer step, in samples, the same on any number of devices.
        decay_fraction: Part of all steps, the last ones, over which the rate falls; before them it stays at the peak
            (warmup-stable-decay). 1 is everything after the warm-up.
        decay_type: How it falls: half a cosine, a line, or 1 - sqrt of the part done.
    """

    min_lr: float = 0.0
    batch_size: int = 64
    decay_fraction: float = 1.0
    decay_type: DecayType = "cosine"

    def __post_init__(self) -> None:
        """Check the ranges; ValueError names the key."""
        require("schedule.min_lr", self.min_lr, self.min_lr >= 0, "0 or above")
        require("schedule.batch_size", self.batch_size, self.batch_size >= 1, "1 or above")
        require("schedule.decay_fraction", self.decay_fraction, 0 <= self.decay_fraction <= 1, "from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class EpochSchedule(ScheduleConfig):
    """How long, in what batches, at what rate.

    Args:
        epochs: Passes over the training set.
        warmup_epochs: Linear warm-up from 0, step by step, over this many epochs.
    """

    epochs: float = 1.0
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges; ValueError names the key."""
        super().__post_init__()
        require("schedule.epochs", self.epochs, self.epochs > 0, "above 0")
        warmup = 0 <= self.warmup_epochs <= self.epochs
        require("schedule.warmup_epochs", self.warmup_epochs, warmup, f"from 0 to schedule.epochs ({self.epochs})")

    def budget(self, steps_per_epoch: int) -> Budget:
        """Return the steps that the epochs come to."""
        return Budget(max(1, round(self.epochs * steps_per_epoch)), round(self.warmup_epochs * steps_per_epoch))


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How the loop runs; all intervals are in optimizer steps, and the last step always counts as due.

    Args:
        micro_batch_size: Samples in one forward and backward on one device; the rest is accumulated.
        precision: float32, or bf16 autocast over float32 weights.
        compile: Compile the model with torch.compile.
        log_every: Steps between training rows in metrics.jsonl.
        val_every: Steps between validations on the held-out samples.
        val_samples: Held-out samples used in each validation; null is all of them.
        num_diagnostic_samples: Held-out samples (without any, a language model's training sequences) for diagnostics
            (reconstructions, mixing, expert load) every `val_every` steps; 0 is none.
        max_nonfinite_steps: Steps of a run that may be skipped, without an update, because their loss or gradient is
            not finite; one more stops the run.
        world_size: Required number of processes, all machines together; any other number is an error. null accepts
            the launcher's.
        trackers: Trackers of accelerate by name, e.g. tensorboard, wandb; [] is none. A resumed run goes on in the
            same W&B run; files are in the run folder, in trackers.
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
        """Check the ranges; ValueError names the key."""
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
    """Checkpoints; intervals are in optimizer steps, and the last step always counts as due.

    Args:
        interval: Steps between checkpoints: the most work that a crash can lose. Checkpoints are written while
            training continues; a temporary one half-way between two is replaced by the next.
        keep_latest: Number of newest checkpoints to keep, without the half-way one.
        keep_interval: Steps between checkpoints that are kept permanently, a multiple of interval; null keeps none.
    """

    interval: int = 500
    keep_latest: int = 2
    keep_interval: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges; ValueError names the key."""
        for name in ("interval", "keep_latest"):
            require(f"checkpoint.{name}", getattr(self, name), getattr(self, name) >= 1, "1 or above")
        kept = self.keep_interval is None or (self.keep_interval >= 1 and self.keep_interval % self.interval == 0)
        multiple = f"a multiple of checkpoint.interval ({self.interval}), or null"
        require("checkpoint.keep_interval", self.keep_interval, kept, multiple)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every run has; a half (vision, language) adds its model and data.

    Args:
        name: Name of the run; its folder is out/name.
        seed: Seed of the weights, the order of the data and every augmentation.
        out: Folder of all runs.
        resume: auto continues a run that has begun; never refuses to; force continues even though keys differ.
        start_from: A checkpoint of another run (RUN/checkpoints/step_XXXXXXXX) to begin with instead of new weights:
            weights, optimizer, position in the data and step. So a warmup-stable-decay run is decayed from any of
            its stable checkpoints.
        optim: The optimizer.
        schedule: How long, in what batches, at what rate.
        loop: How the loop runs.
        checkpoint: Checkpoints.
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
        """Check the fields; ValueError names the key."""
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
        """Return options, each enough by itself, with which a run may go on whose loss was not finite."""
        clip = 1.0 if self.optim.max_grad_norm is None else min(1.0, self.optim.max_grad_norm / 2)
        return f"--optim.lr {self.optim.lr / 2:.3g}", f"--optim.max_grad_norm {clip:.3g}"


RESUME_MUTABLE_KEYS = frozenset(
    {"out", "resume"}
    | {f"loop.{key}" for key in ("micro_batch_size", "compile", "log_every", "val_every", "num_diagnostic_samples")}
    | {f"loop.{key}" for key in ("max_nonfinite_steps", "world_size", "trackers")}
    | {f"checkpoint.{key}" for key in ("interval", "keep_latest", "keep_interval")}
)
"""Keys that may change when a run is resumed: they say how it is run and recorded, not what is trained."""

START_FROM_MUTABLE_KEYS = frozenset(
    {"name", "start_from"}
    | {f"schedule.{key}" for key in ("epochs", "warmup_epochs", "tokens", "tokens_per_parameter", "warmup_steps")}
    | {f"schedule.{key}" for key in ("min_lr", "decay_fraction", "decay_type")}
)
"""Keys that may differ between a run and the one whose checkpoint it begins with."""


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
"""Keys of configurations before 0.1.0 -> their names since. An old key is an error that names the new one."""


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

    `--config FILE` (several are layered in order) and `--key.subkey VALUE`, where later ones win; without `--config`
    the file `default` is read first. `--help` prints the keys, `--print_config` the values as they were given, and
    `--check` all values once they have been found to be possible; each ends with exit code 0.

    Args:
        kind: The dataclass.
        arguments: Words of the command line.
        program, summary: Name and purpose of the program, for --help and messages.
        default: File that is read when none is named.
        plain: Fields of `kind` that are ordinary arguments rather than keys: what `add_argument` takes, by "name" (a
            word without a key) or "--name", e.g. {"run": {"type": str, "help": "..."}}.
        check: What `--check` does beyond building the dataclass; raises ValueError for what a run would refuse.

    Raises:
        SystemExit: code 0 after those three; code 2, after one message on stderr that names the key, the file or the
            value at fault.
    """
    plain = plain or {}
    positionals = "".join(
        f"{options.get('metavar', name.upper())}{' ...' if options.get('nargs') == '+' else ''} "
        for name, options in plain.items()
        if not name.startswith("-")
    )
    usage = f"%(prog)s {positionals}[--config FILE] [--KEY.SUBKEY VALUE ...]"
    parser = ArgumentParser(prog=program, usage=usage, description=summary, exit_on_error=False, allow_abbrev=False)
    usual = "" if default is None else f" (without one: {default.name})"
    parser.add_argument("--config", action="config", help=f"YAML file; keys given after it override it{usual}")
    parser.add_argument(
        "--check",
        action="store_true",
        default=SUPPRESS,
        help="find out whether this can be run, print all values, and end",
    )
    for name, options in plain.items():
        parser.add_argument(name, **options)
    parser.add_class_arguments(kind, skip={name.removeprefix("--") for name in plain})
    given = any(argument.split("=")[0] == "--config" for argument in arguments)
    first = [] if given or default is None else [f"--config={default}"]
    try:
        words = _expand_bases([*first, *arguments])
        _check_texts(words)
        namespace = _parsed(parser, words)
        del namespace["config"]
        for group in {str(action.dest).partition(".")[0] for action in parser._actions if "." in str(action.dest)}:
            mapping = isinstance(namespace[group], Namespace)
            require(group, namespace[group], mapping, "keys with values")  # jsonargparse lets a list through
        checking = namespace.pop("check", False)
        _check_given(kind, namespace)
        config = kind(**parser.instantiate(namespace).as_dict())
        for key, value in flatten(as_tree(config)).items():
            require(key, value, not isinstance(value, float) or math.isfinite(value), "a finite number")
        if checking and check is not None:
            check(config)
    except (ArgumentError, ValueError) as error:
        _refuse(parser, str(error))
    if checking:
        print(yaml.safe_dump(as_tree(config), sort_keys=False), end="")
        raise SystemExit(0)
    return config


def read_config(path: Path) -> dict[str, Any]:
    """Return the keys of a YAML config merged over those of its `base`: a file, or several, relative to the config.

    Raises:
        ConfigError: A file is missing, is not a YAML mapping, or is its own base.
    """
    return _read_over_bases(path, ())


def _read_over_bases(path: Path, derived: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in derived:
        raise ConfigError(f"{path}: base leads back to this file; remove the cycle")
    tree = read_yaml(path, "--config takes YAML files of keys with values", empty=True)
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


def _expand_bases(words: Sequence[str]) -> list[str]:
    """Replace each config file that has a `base` by its merged keys as YAML text."""
    expanded: list[str] = []
    for word in words:
        option, equals, value = word.partition("=")
        file = value if equals and option == "--config" else word if expanded[-1:] == ["--config"] else ""
        if file and _is_file(file) and "base" in read_yaml(Path(file), "--config takes YAML files", empty=True):
            text = yaml.safe_dump(read_config(Path(file)), sort_keys=False)
            word = f"--config={text}" if equals else text
        expanded.append(word)
    return expanded


def _parsed(parser: ArgumentParser, words: Sequence[str]) -> Namespace:
    """Return what jsonargparse makes of them. Raises ArgumentError, or ValueError where it has no word."""
    try:
        return parser.parse_args(words)
    except OverflowError as error:
        raise ValueError(f"a number is too large ({error})") from error


def _check_texts(words: Sequence[str]) -> None:
    """Raise ValueError for a value that is too deep or too large, or a file that is no mapping of a configuration."""
    for before, word in zip(["", *words], words, strict=False):
        option, equals, value = word.partition("=")
        text = value if equals else word
        try:
            check_shape(text)
        except ValueError as error:
            raise ValueError(f"{text if len(text) < 99 else option}: {error}") from error
        _check_renamed([option.removeprefix("--")], "the command line")
        if "--config" in (option, before) and _is_file(text):
            content = read_yaml(Path(text), "--config takes YAML files of keys with values", empty=True)
            if "config" in content:  # jsonargparse keeps the files' names under this key
                raise ValueError(f"{text} has the key 'config', which is none of a configuration")
            _check_renamed(flatten(content), text)


def _check_renamed(keys: Iterable[str], source: str) -> None:
    """Raise ValueError for a key of `RENAMED_KEYS`."""
    for key in keys:
        if key in RENAMED_KEYS:
            raise ValueError(f"{source}: {key} was renamed to {RENAMED_KEYS[key]}")


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # no name of a file; the parser will say so
        return False


def _check_given(kind: type, namespace: Namespace, prefix: str = "") -> None:
    """Raise ValueError for a key that is null but must not be, which jsonargparse lets through."""
    hints = get_type_hints(kind)
    for key in dataclasses.fields(kind):
        hint = hints[key.name]
        if key.name not in namespace:
            continue  # one of parse_config's `plain`
        value = namespace[key.name]
        if isinstance(value, Namespace) and dataclasses.is_dataclass(hint):
            _check_given(cast(type, hint), value, f"{prefix}{key.name}.")
        elif value is None:
            optional = hint is Any or type(None) in get_args(hint)
            require(f"{prefix}{key.name}", value, optional, getattr(hint, "__name__", str(hint)))


def _refuse(parser: ArgumentParser, message: str) -> NoReturn:
    """Print one message, with the key that was probably meant, once a machine; exit with code 2."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        parser.exit(2)
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


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"optim.lr": ...} for {"optim": {"lr": ...}}; an empty dict stays a value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and value
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat


def differing_keys(
    old: dict[str, Any], new: dict[str, Any], *, mutable_keys: frozenset[str] = RESUME_MUTABLE_KEYS
) -> list[str]:
    """Return "optim.lr: 0.001 -> 0.002" for every dotted key whose value differs between two config trees."""
    before, after = flatten(old), flatten(new)
    return [
        f"{key}: {before.get(key, 'absent')!r} -> {after.get(key, 'absent')!r}"
        for key in sorted(before.keys() | after.keys())
        if key not in mutable_keys and before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]


_ABSENT = object()
