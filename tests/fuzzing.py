"""Malformed files from good ones: what the fuzz tests of all folders share. Loaded by the fixture `fuzz`."""

import contextlib
import copy
import datetime
import json
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

ODD = (
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**30, 10**400, 0.5, -0.5, 1e-320, 1e308),
    *(
        math.nan,
        math.inf,
        -math.inf,
        "",
        "0",
        "nan",
        "1e999",
        "\0",
        "..",
        "../../x",
        "/",
        "a\nb",
        "\ud800",
        "x" * 300,
    ),
    *([], {}, [[]], [None], [0, 0], [[1.0], [1.0, 2.0]], {"": None}, {"a": {"a": {}}}, [{}], ["", ""]),
)
"""Values that readers do not expect: JSON can hold all of them (NaN, infinity and half a surrogate pair included)."""

ODD_IN_YAML = (
    *(datetime.date(2026, 1, 1), datetime.datetime(2026, 1, 1), b"\xff", {1, 2}),
    *({1: 2, None: 3, "a": 4}, {1.5: {True: 0}}, {datetime.date(2026, 1, 1): 1}),
)
"""Values that YAML has besides."""

_TEXTS = (
    *("", "\n", "\0", "null", "[]", "{}", "[[]]", '""', "1", "NaN", "-", "?", "{", '{"a":', "\ufeff{}", "a: b: c"),
    *("- a\nb: c", "\t- a", "a: !!python/object:os.system {}", "a: !!python/name:os.system", "!!set {a, a}", "*a"),
    *("a: !!int x", "a: !!float x", "a: !!timestamp 2026-99-99", "2026-02-30", "!!binary '%'", "a: &a [*a]"),
    *("&a {b: *a}", "&a [*a]", "<<: 1", "<<: [1]", "? [a]\n: b", "? {a: b}\n: c", "%YAML 9.9\n---\na: 1"),
    *("---\na: 1\n---\nb: 2", "a: 1\na: 2", "{a: " * 20_000, '{"a":' * 100_000, "- " * 20_000),
    *("1" * 5000, "a: " + "1" * 5000, '{"step": ' + "1" * 5000 + "}", '"\\ud800"', '{"\\ud800": "\\udfff"}'),
    *("1:30:99", "0x", "0o9", "a: 0b", "a: 1_000_", "a: .inf", "=", "!!null x", "\u2028", "a: |\n b\n  c"),
)
_BYTES = (b"\xff\xfe", b"\x80", b"\xef\xbb\xbf{}", b"\x89PNG\r\n\x1a\n", bytes(64), b"\xff" * 16)
ODD_TEXTS = (*(text.encode() for text in _TEXTS), *_BYTES)
"""Whole contents of files."""


TYPES = (
    *(torch.float64, torch.int64, torch.bfloat16, torch.bool, torch.uint8),
    *(torch.float8_e4m3fn, torch.complex64),
)
"""Types of tensors that a reader of float32 ones does not expect; NumPy lacks some."""


def paths(tree: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every node of a tree of dicts and lists, the root included."""
    yield prefix
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        yield from paths(value, (*prefix, key))


def get(tree: Any, path: Sequence[Any]) -> Any:
    """The node at a place."""
    for key in path:
        tree = tree[key]
    return tree


@st.composite
def mutated(draw: st.DrawFn, tree: Any, *, odd: Sequence[Any] = ODD, most: int = 3) -> Any:
    """A tree with one to `most` of its nodes replaced, taken out, renamed, repeated, retyped, wrapped or swapped."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, most))):
        places = list(paths(tree))
        tree = _mutate(draw, tree, places, draw(st.sampled_from(places)), odd)
    return tree


def _mutate(draw: st.DrawFn, tree: Any, places: Sequence[Any], path: tuple[Any, ...], odd: Sequence[Any]) -> Any:
    how = draw(st.sampled_from(("odd", "odd", "odd", "take out", "rename", "repeat", "retype", "wrap", "another")))
    if not path:  # the root stays most of the time: there is more to be found below it
        return copy.deepcopy(draw(st.sampled_from(odd))) if draw(st.integers(0, 9)) == 0 else tree
    parent, key = get(tree, path[:-1]), path[-1]
    if how == "odd":
        parent[key] = copy.deepcopy(draw(st.sampled_from(odd)))
    elif how == "take out":
        del parent[key]
    elif how == "rename" and isinstance(parent, dict):
        parent[draw(st.sampled_from(("", "x", "__class__", f"{key} ", "a.b", "config", "\ud800")))] = parent.pop(key)
    elif how == "repeat" and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    elif how == "retype":
        parent[key] = _retyped(parent[key])
    elif how == "another":
        parent[key] = copy.deepcopy(get(tree, draw(st.sampled_from(places))))
    else:
        parent[key] = draw(st.sampled_from(([parent[key]], {"x": parent[key]}, [parent[key]] * 3)))
    return tree


def _retyped(value: Any) -> Any:
    """The same in another type."""
    if isinstance(value, bool | str):
        return [*str(value)]
    if isinstance(value, int | float):
        return str(value)
    return [*value] if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else "None"


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of a file that are flipped, cut, filled or emptied at one to four places, or something else."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(ODD_TEXTS) | st.binary(max_size=64))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        length = draw(st.sampled_from((1, 1, 2, 8, 64, 1000)))
        put_in = draw(st.sampled_from(ODD_TEXTS) | st.binary(max_size=9))[:1000]
        content = draw(
            st.sampled_from(
                (
                    content[:at] + put_in[:length] + content[at + length :],
                    content[:at] + content[at + length :],
                    content[:at] + put_in + content[at:],
                    content[:at] + content[at : at + length] * 2 + content[at + length :],
                    content[:at],
                )
            )
        )
    return content


def as_json(tree: Any) -> bytes:
    """A tree as Python's json writes it."""
    return json.dumps(tree).encode()


def as_yaml(tree: Any) -> bytes:
    """A tree as YAML; what YAML has no text for is left to JSON, which is YAML too."""
    try:
        return yaml.safe_dump(tree, sort_keys=False).encode()
    except (UnicodeEncodeError, yaml.YAMLError):
        return json.dumps(tree, default=str).encode()


def json_file(content: bytes) -> st.SearchStrategy[bytes]:
    """A JSON file gone wrong, from a good one."""
    return mutated(json.loads(content)).map(as_json) | damaged(content)


def yaml_file(content: bytes) -> st.SearchStrategy[bytes]:
    """A YAML file gone wrong, from a good one."""
    return mutated(yaml.safe_load(content), odd=ODD + ODD_IN_YAML).map(as_yaml) | damaged(content)


@st.composite
def lines_file(draw: st.DrawFn, content: bytes) -> bytes:
    """A file of JSON lines gone wrong in one of its rows, in their order, or in its bytes."""
    if draw(st.booleans()):
        return draw(damaged(content))
    lines = content.split(b"\n")[:-1]
    for _ in range(draw(st.integers(1, 2))):
        at, other = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
        how = draw(st.sampled_from(("mutate", "mutate", "mutate", "repeat", "swap", "take out", "odd")))
        if how == "mutate":
            with contextlib.suppress(ValueError):  # an odd row of before
                lines[at] = as_json(draw(mutated(json.loads(lines[at]))))
        elif how == "repeat":
            lines.insert(other, lines[at])
        elif how == "swap":
            lines[at], lines[other] = lines[other], lines[at]
        elif how == "take out" and len(lines) > 1:
            del lines[at]
        else:
            lines[at] = draw(st.sampled_from(ODD_TEXTS))
    return b"\n".join(lines) + b"\n"


@st.composite
def tensors_file(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file gone wrong: in its header (names, types, shapes, places), in its bytes, or in its values."""
    how = draw(st.sampled_from(("header", "header", "bytes", "length", "values")))
    size = int.from_bytes(content[:8], "little")
    if how == "bytes":
        return draw(damaged(content))
    if how == "length":
        other = draw(st.sampled_from((0, 1, size - 1, size + 1, 100_000_001, 2**31, 2**63, 2**64 - 1)))
        return other.to_bytes(8, "little") + content[8:]
    if how == "values":
        return draw(_other_tensors(content))
    header = as_json(draw(mutated(json.loads(content[8 : 8 + size]))))
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


@st.composite
def _other_tensors(draw: st.DrawFn, content: bytes) -> bytes:
    """A whole safetensors file with some tensors of other types, shapes, names or values."""
    tensors = load(content)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(tensors)))
        tensor = tensors.pop(name)
        changes = {
            "type": lambda t: t.to(draw(st.sampled_from(TYPES))),
            "shape": lambda t: t[None],
            "flat": lambda t: t.flatten(),
            "empty": lambda t: t.flatten()[:0],
            "short": lambda t: t.flatten()[:-1],
            "nan": lambda t: torch.full_like(t.float(), float("nan")),
            "zero": torch.zeros_like,
            "scalar": lambda t: torch.tensor(3.0),
        }
        how = draw(st.sampled_from((*changes, "name", "take out")))
        if how != "take out" or not tensors:
            other = draw(st.sampled_from((*sorted(tensors), "x", "", ".", "0.cpu", "0.weight", "3.bias.step")))
            tensors[other if how == "name" else name] = changes.get(how, lambda t: t)(tensor).contiguous()
    return save({name: tensor.clone() for name, tensor in tensors.items()})


def file_like(path: Path) -> st.SearchStrategy[bytes]:
    """The content of a file gone wrong, in the way of its kind, which its name's ending tells."""
    kinds = {
        ".yaml": yaml_file,
        ".jsonl": lines_file,
        ".json": json_file,
        ".safetensors": tensors_file,
    }
    return kinds.get(path.suffix, damaged)(path.read_bytes())


def damage(folder: Path, names: Sequence[str]) -> st.SearchStrategy[tuple[str, bytes]]:
    """(name, content) of one of a folder's files gone wrong."""
    return st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), file_like(folder / name)))


@contextlib.contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    """A file with another content for a while."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def refusal(action: Callable[[], Any], *errors: type[BaseException], seconds: int = 120) -> BaseException | None:
    """Do it; return None, or the error if it is exactly of one of these types (a subclass is another's error).

    What takes longer than `seconds` ends in TimeoutError, where Python gets to see the signal.
    """

    def late(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        action()
    except errors as error:
        if type(error) not in errors:
            raise
        return error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return None


def run(strategy: st.SearchStrategy[Any], act: Callable[[Any], None], *, examples: int, thorough: bool) -> None:
    """Call `act` with examples, the same ones in every run; `thorough`: 20 times as many.

    MOA_FUZZ_FACTOR=200 in the environment sets that number, with new examples in every run.
    """
    every = tuple(HealthCheck)
    phases = (Phase.generate, Phase.shrink) if thorough else (Phase.generate,)
    factor = int(os.environ.get("MOA_FUZZ_FACTOR", "20")) if thorough else 1
    chosen = settings(
        max_examples=factor * examples,
        derandomize="MOA_FUZZ_FACTOR" not in os.environ,
        deadline=None,
        database=None,
        suppress_health_check=every,
        phases=phases,
    )

    @chosen
    @given(strategy)
    def attempt(example: Any) -> None:
        act(example)

    attempt()
