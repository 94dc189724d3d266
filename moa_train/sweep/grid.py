"""The runs of a sweep: configs x values x seeds, named, and checked before the first one starts."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from moa_train.errors import ConfigError
from moa_train.run_folder import RunFolder
from moa_train.sweep.state import SweepRun

OWN_KEYS = {"name": "the sweep names its runs", "seed": "use --seeds", "out": "use --out", "config": "use --config"}
"""Keys that the sweep sets, with what to do instead of setting them."""


def parse_settings(texts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return {"optim.lr": ("3e-4", "6e-4")} for ["optim.lr=3e-4,6e-4"].

    The values form a YAML list, so commas inside brackets, braces or quotes do not separate. Quotes are removed.

    Raises:
        ConfigError: A text is not KEY=VALUE,..., or a key is repeated or set by the sweep itself.
    """
    settings: dict[str, tuple[str, ...]] = {}
    for text in texts:
        key, _, listed = text.partition("=")
        if key in OWN_KEYS:
            raise ConfigError(f"--set {key}: {OWN_KEYS[key]}")
        if key in settings:
            raise ConfigError(f"--set {key} is given twice; give all values at once: {key}=A,B")
        settings[key] = tuple(_split(listed))
        if not (key and settings[key]):
            raise ConfigError(f"--set is {text!r}; it must be KEY=VALUE,VALUE,..., e.g. optim.lr=3e-4,6e-4")
    return settings


def _split(text: str) -> list[str]:
    """Return the items of a YAML list without its brackets, each as it is written."""
    source = f"[{text}]"
    try:
        items = yaml.compose(source, Loader=yaml.SafeLoader).value
    except yaml.YAMLError as error:
        raise ConfigError(f"--set values {text!r} are not a YAML list; quote special characters") from error
    return [
        item.value if isinstance(item, yaml.ScalarNode) else source[item.start_mark.index : item.end_mark.index]
        for item in items
    ]


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return (0, 1, 2) for "3", (0, 5) for "0,5" and (5,) for "5,".

    Raises:
        ConfigError: The text is neither a count nor a list.
    """
    numbers = text.removesuffix(",").split(",")
    if not all(number.isdecimal() for number in numbers) or text == "0":
        raise ConfigError(f"--seeds is {text!r}; it must be a count (3: 0, 1, 2) or a list (0,1,5; one seed: '5,')")
    seeds = tuple(map(int, numbers))
    return seeds if "," in text else tuple(range(seeds[0]))


def expand(
    configs: Sequence[Path],
    settings: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    *,
    out: Path | None = None,
    extra: Sequence[str] = (),
) -> list[SweepRun]:
    """Return all combinations, seed outermost and config innermost, so that comparable sets complete early.

    A run is named after its config file, values and seed. `out` is by default runs/sweep_ and the common beginning of
    the files' names; `extra` are arguments for all runs. Raises ConfigError if two combinations share a name, or if
    `extra` sets a key of the sweep.
    """
    for argument in extra:
        key = argument.removeprefix("--").partition("=")[0]
        if argument.startswith("--") and key in {*OWN_KEYS, *settings} - {"config"}:
            raise ConfigError(f"--{key} after -- is not allowed: {OWN_KEYS.get(key, 'it is already in --set')}")
    common = os.path.commonprefix([config.stem for config in configs]).rstrip("_.-")  # noqa: RUF071 (of characters)
    out = out or Path("runs") / f"sweep_{common or configs[0].stem}"
    runs = []
    for seed, values, config in itertools.product(seeds, itertools.product(*settings.values()), configs):
        chosen = dict(zip(settings, values, strict=True))
        labels = [f"{key.rpartition('.')[2]}{value}" for key, value in chosen.items()]
        name = re.sub(r"[^\w.+-]+", "-", "_".join([config.stem, *labels, f"s{seed}"]), flags=re.ASCII)
        own = {**chosen, "name": name, "seed": seed, "out": out}
        arguments = ["--config", str(config), *extra, *(f"--{key}={value}" for key, value in own.items())]
        runs.append(SweepRun(name, out / name, out / "logs" / f"{name}.log", arguments))
    repeated = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
    if repeated:
        raise ConfigError(f"several runs would be named {repeated[0]}; give each config, value and seed once")
    return runs


class Trainer(NamedTuple):
    """A training script, its function that takes the arguments, and the config keys that may change on a resume."""

    script: Path
    main: Callable[[Sequence[str]], Any]
    mutable_keys: frozenset[str]


def check(run: SweepRun, trainer: Trainer) -> None:
    """Check the config, model, data and folder of a run, and set its state if it is done.

    Raises:
        ConfigError: The training script rejects the config, or the folder holds another run.
        DataError: A file of the run folder is damaged.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = trainer.main([*run.arguments, "--check"])
        except SystemExit as end:
            code = end.code
    if code:
        message = re.sub(r"^(\S+: )?error: ", "", err.getvalue().strip())
        raise ConfigError(f"{run.name}: {message}")
    config = yaml.safe_load(out.getvalue())
    if not RunFolder(run.folder).check(config, config["resume"], trainer.mutable_keys):
        run.settle("waiting")
