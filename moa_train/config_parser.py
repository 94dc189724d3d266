"""Parser of configs: YAML files, which may extend others, with dotted command-line overrides."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast, get_args, get_type_hints

import yaml

from moa_train.errors import ConfigError, DataError, require, wait_for_local_rank_0
from moa_train.reading import flatten, read_yaml

if TYPE_CHECKING:  # otherwise imported late: benchmarks use the dataclasses without a parser
    from jsonargparse import ArgumentParser, Namespace

Config = TypeVar("Config")

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
    from jsonargparse import ArgumentError

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
    from jsonargparse import SUPPRESS, ArgumentParser

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
    if not isinstance(bases, list) or not all(isinstance(base, str) and base.isprintable() for base in bases):
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
    from jsonargparse import Namespace

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
