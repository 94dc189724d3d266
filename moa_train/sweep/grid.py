"""Configs x values x seeds -> named runs, checked before the first one starts."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from moa_train.config import read_config

OWN_KEYS = {"name": "the sweep names its runs", "seed": "use --seeds", "out": "use --out", "config": "use --config"}
"""Keys that the sweep itself sets, and what to do instead of setting them."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        name: Its name, unique in the sweep; its folder is out/name.
        config: The configuration file.
        settings: What is set on top of it, {dotted key: value as given}.
        seed: Its seed.
        out: Folder of the sweep's runs.
        extra: Arguments that every run of the sweep gets.
    """

    name: str
    config: Path
    settings: Mapping[str, str]
    seed: int
    out: Path
    extra: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.out / self.name

    @property
    def log(self) -> Path:
        """The file that its output goes to; outside of the run folder, which belongs to the run."""
        return self.out / "logs" / f"{self.name}.log"

    @property
    def arguments(self) -> list[str]:
        """The training script's arguments."""
        own = {**self.settings, "name": self.name, "seed": self.seed, "out": self.out}
        return ["--config", str(self.config), *self.extra, *(f"--{key}={value}" for key, value in own.items())]


def parse_settings(texts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return {"optim.lr": ("3e-4", "6e-4")} for ["optim.lr=3e-4,6e-4"].

    Commas inside brackets, braces or quotes do not separate; quotes around a value are taken off.

    Raises:
        ValueError: not KEY=VALUE, a key or a value given twice, or a key that the sweep itself sets.
    """
    settings: dict[str, tuple[str, ...]] = {}
    for text in texts:
        key, equals, listed = text.partition("=")
        key = key.strip().removeprefix("--")
        values = tuple(split_values(listed))
        if not (key and equals and all(values)):
            raise ValueError(f"--set is {text!r}; it must be KEY=VALUE,VALUE,..., e.g. optim.lr=3e-4,6e-4")
        if key in OWN_KEYS:
            raise ValueError(f"--set names {key!r}, which it cannot: {OWN_KEYS[key]}")
        if key in settings:
            raise ValueError(f"--set names {key!r} twice; give all its values at once: {key}=A,B")
        _refuse_twice(f"--set {key}", [short(value) or value for value in values])
        settings[key] = values
    return settings


def split_values(text: str) -> list[str]:
    """Return the parts of `text` between its commas, those inside brackets, braces or quotes aside."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [re.sub(r"^(['\"])(.*)\1$", r"\2", part.strip()) for part in parts]


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return (0, 1, 2) for "3" and (0, 5) for "0,5"; "5," is seed 5 alone. Raises ValueError."""
    numbers = [part.strip() for part in text.removesuffix(",").split(",")]
    if not all(re.fullmatch(r"\d+", number) for number in numbers) or text == "0":
        raise ValueError(f"--seeds is {text!r}; it must be how many (3 is 0, 1, 2) or which (0,1,5; '5,' is 5 alone)")
    seeds = [int(number) for number in numbers]
    _refuse_twice("--seeds", seeds)
    return tuple(seeds) if "," in text else tuple(range(seeds[0]))


def _refuse_twice(where: str, values: Sequence[Any]) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ValueError(f"{where} gives {twice[0]!r} twice; give each value once")


def expand(
    configs: Sequence[Path],
    settings: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    *,
    out: Path | None = None,
    extra: Sequence[str] = (),
) -> list[PlannedRun]:
    """Return every combination, in an order that completes comparable sets early: seed, then values, then config.

    Args:
        configs: Configuration files.
        settings: {dotted key: values}; all combinations of them are taken.
        seeds: Seeds.
        out: Folder of the runs; by default runs/sweep_ and what the configs' names begin with.
        extra: Arguments for every run.

    Raises:
        ValueError: a config file cannot be read or is given twice, or `extra` sets what the sweep sets.
    """
    _refuse_twice("--config", [str(path) for path in configs])
    _check_extra(extra, settings)
    names = name_configs(configs)
    out = default_out(names.values()) if out is None else out
    keys = short_keys(settings)
    labels = {key: label_values(values) for key, values in settings.items()}
    runs = []
    for seed in seeds:
        for values in itertools.product(*settings.values()):
            chosen = dict(zip(settings, values, strict=True))
            parts = [f"{keys[key]}{labels[key][value]}" for key, value in chosen.items()] + [f"s{seed}"]
            for config in configs:
                name = "_".join([names[config], *parts])
                runs.append(PlannedRun(name, config, chosen, seed, out, tuple(extra)))
    return _told_apart(runs)


def _told_apart(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Return the runs; where an underscore in a value makes two of one name, each gets a mark of its own."""
    count = Counter(run.name for run in runs)
    return [
        run if count[run.name] == 1 else replace(run, name=f"{run.name}-{_digest(f'{run.config} {run.settings}')}")
        for run in runs
    ]


def _check_extra(extra: Sequence[str], settings: Mapping[str, Any]) -> None:
    for argument in extra:
        key = argument.removeprefix("--").partition("=")[0]
        if argument.startswith("--") and key in (OWN_KEYS.keys() - {"config"}) | settings.keys():
            raise ValueError(f"--{key} stands after --, which cannot be: {OWN_KEYS.get(key, 'it is among --set')}")


def name_configs(configs: Sequence[Path]) -> dict[Path, str]:
    """Return each file's `name`; where several have the same one, or none, the file's name without its ending.

    Raises ValueError for a file that cannot be read or files that could not be told apart.
    """
    names = {}
    for path in configs:
        tree = read_config(path)
        names[path] = str(tree.get("name") or path.stem)
    count = Counter(names.values())
    names = {path: name if count[name] == 1 else path.stem for path, name in names.items()}
    clash = next((name for name, times in Counter(names.values()).items() if times > 1), None)
    if clash is not None:
        paths = ", ".join(str(path) for path, name in names.items() if name == clash)
        raise ValueError(f"--config: {paths} would all be called {clash!r}; give each a `name` of its own")
    return {path: safe(name) for path, name in names.items()}


def default_out(names: Iterable[str]) -> Path:
    """Return runs/sweep_NAME, where NAME is what all `names` begin with, or the first of them."""
    names = list(names)
    common = "".join(a[0] for a in itertools.takewhile(lambda a: len(set(a)) == 1, zip(*names, strict=False)))
    return Path("runs") / f"sweep_{common.rstrip('_.-') or names[0]}"


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Return the last part of each dotted key, or as many parts as tell it from the others."""
    keys = list(keys)

    def tail(key: str, parts: int) -> str:
        return "-".join(key.split(".")[-parts:])

    return {
        key: next(
            (tail(key, n) for n in range(1, 1 + key.count(".")) if [tail(k, n) for k in keys].count(tail(key, n)) == 1),
            tail(key, 0),
        )
        for key in keys
    }


def label_values(values: Sequence[str]) -> dict[str, str]:
    """Return a short text for each value that can stand in a file name, different for different values."""
    labels = {value: short(value) or safe(value) for value in values}
    count = Counter(labels.values())
    return {v: label if count[label] == 1 else f"{label}-{_digest(v)}" for v, label in labels.items()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def safe(text: str) -> str:
    """Return `text` with every run of characters that a folder name should not have as one dash."""
    return re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII).strip("-") or "-"


def short(text: str) -> str:
    """Return a number's shortest usual form ("3e-4" for "0.0003", "0.05" for "5e-2"), "" for what is no number."""
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text.strip()):
        return ""
    number = Decimal(text.strip()).normalize()
    if number == 0:
        return "0"
    sign, digits, _ = number.as_tuple()
    if -3 < number.adjusted() < 6:
        return f"{number:f}"
    mantissa = "".join(map(str, digits))
    mantissa = mantissa[0] + ("." + mantissa[1:] if mantissa[1:] else "")
    return f"{'-' * sign}{mantissa}e{number.adjusted()}"
