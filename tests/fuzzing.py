"""Damaged versions of files, for the fuzz tests of all packages; loaded by the fixture `fuzz`."""

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
    *(None, True, 0, -1, 7, 2**63, 10**400, 0.5, 1e308, math.nan, math.inf),
    *("", "0", "1e999", "\0", "../../x", "a\nb", "\ud800", "x" * 300),
    *([], {}, [[]], [None], [0, 0], [[1.0], [1.0, 2.0]], {"": None}, {"a": {"a": {}}}),
)
"""Values that readers do not expect: JSON can hold all of them (NaN, infinity and half a surrogate pair included)."""

ODD_IN_YAML = (datetime.date(2026, 1, 1), b"\xff", {1, 2}, {1: 2, None: 3, "a": 4}, {1.5: {True: 0}})
"""Further values of YAML."""

_TEXTS = (
    *("", "\0", "null", "[]", '""', "1", "NaN", "{", '{"a":', "\ufeff{}", "a: b: c", "- a\nb: c", "\t- a"),
    *("a: !!python/object:os.system {}", "!!set {a, a}", "*a", "a: !!int x", "2026-02-30", "!!binary '%'"),
    *("&a {b: *a}", "<<: 1", "? [a]\n: b", "%YAML 9.9\n---\na: 1", "---\na: 1\n---\nb: 2", "a: 1\na: 2"),
    *("{a: " * 20_000, '{"a":' * 100_000, "1" * 5000, "a: " + "1" * 5000, '{"\\ud800": "\\udfff"}', "a: .inf", "="),
)
ODD_TEXTS = (*(text.encode() for text in _TEXTS), b"\xff\xfe", b"\x80", bytes(64), b"\xff" * 16)
"""Whole contents of files."""

TYPES = (torch.float64, torch.int64, torch.bfloat16, torch.bool, torch.float8_e4m3fn, torch.complex64)
"""Types of tensors that a reader of float32 ones does not expect; NumPy lacks some."""


def paths(tree: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every node of a tree of dicts and lists, the root included."""
    yield prefix
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        yield from paths(value, (*prefix, key))


def get(tree: Any, path: Sequence[Any]) -> Any:
    """Return the node at a path."""
    for key in path:
        tree = tree[key]
    return tree


@st.composite
def mutated(draw: st.DrawFn, tree: Any, *, odd: Sequence[Any] = ODD) -> Any:
    """Return a tree with one to three nodes replaced, removed, renamed, repeated or wrapped."""
    tree = copy.deepcopy(tree)
    if draw(st.integers(0, 29)) == 0:
        return copy.deepcopy(draw(st.sampled_from(odd)))
    for _ in range(draw(st.integers(1, 3))):
        places = [path for path in paths(tree) if path]
        if not places:
            break
        *above, key = draw(st.sampled_from(places))
        parent = get(tree, above)
        how = draw(st.sampled_from(("odd", "odd", "odd", "remove", "rename", "repeat", "wrap", "another")))
        if how == "odd":
            parent[key] = copy.deepcopy(draw(st.sampled_from(odd)))
        elif how == "remove":
            del parent[key]
        elif how == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from(("", "x", f"{key} ", "a.b", "config", "\ud800")))] = parent.pop(key)
        elif how == "repeat" and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif how == "another":
            parent[key] = copy.deepcopy(get(tree, draw(st.sampled_from(places))))
        else:
            parent[key] = draw(st.sampled_from((str(parent[key]), [parent[key]], {"x": parent[key]})))
    return tree


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Return bytes that are replaced, removed, inserted or cut at one to four places, or other content."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(ODD_TEXTS) | st.binary(max_size=64))
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, len(content))), draw(st.sampled_from((0, 1, 2, 8, 64, 1000)))
        inserted = draw(st.just(b"") | st.sampled_from(ODD_TEXTS) | st.binary(max_size=9))[:1000]
        rest = content[at + length :] if draw(st.integers(0, 4)) else b""
        content = content[:at] + inserted + rest
    return content


def as_json(tree: Any) -> bytes:
    """Return a tree as Python's json writes it."""
    return json.dumps(tree).encode()


def as_yaml(tree: Any) -> bytes:
    """Return a tree as YAML, or as JSON where YAML cannot write it."""
    try:
        return yaml.safe_dump(tree, sort_keys=False).encode()
    except (UnicodeEncodeError, yaml.YAMLError):
        return json.dumps(tree, default=str).encode()


def json_file(content: bytes) -> st.SearchStrategy[bytes]:
    """Return damaged versions of a JSON file."""
    return mutated(json.loads(content)).map(as_json) | damaged(content)


def yaml_file(content: bytes) -> st.SearchStrategy[bytes]:
    """Return damaged versions of a YAML file."""
    return mutated(yaml.safe_load(content), odd=ODD + ODD_IN_YAML).map(as_yaml) | damaged(content)


@st.composite
def lines_file(draw: st.DrawFn, content: bytes) -> bytes:
    """Return a file of JSON lines with a damaged or an odd row."""
    lines = content.split(b"\n")[:-1]
    at = draw(st.integers(0, len(lines) - 1))
    lines[at] = draw(mutated(json.loads(lines[at])).map(as_json) | st.sampled_from(ODD_TEXTS))
    return b"\n".join(lines) + b"\n"


@st.composite
def tensors_file(draw: st.DrawFn, content: bytes) -> bytes:
    """Return a safetensors file with a damaged header or an unexpected tensor."""
    if draw(st.booleans()):
        size = int.from_bytes(content[:8], "little")
        header = as_json(draw(mutated(json.loads(content[8 : 8 + size]))))
        length = draw(st.sampled_from((len(header), len(header), len(header) - 1, 2**31, 2**64 - 1)))
        return length.to_bytes(8, "little") + header + content[8 + size :]
    tensors = load(content)
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    others = (*map(tensor.to, TYPES), tensor[None], tensor.flatten()[:-1], torch.full_like(tensor.float(), math.nan))
    new_name = draw(st.sampled_from((name, name, name, "x", "", "0.cpu", "3.bias.step")))
    tensors[new_name] = draw(st.sampled_from((tensor, *others)))
    return save({key: value.clone().contiguous() for key, value in tensors.items()})


def file_like(path: Path) -> st.SearchStrategy[bytes]:
    """Return damaged versions of a file; its suffix selects how."""
    content = path.read_bytes()
    kinds = {".yaml": yaml_file, ".json": json_file, ".jsonl": lines_file, ".safetensors": tensors_file}
    return kinds.get(path.suffix, damaged)(content) | damaged(content)


def damage(folder: Path, names: Sequence[str]) -> st.SearchStrategy[tuple[str, bytes]]:
    """Return (name, damaged content) of one of a folder's files."""
    return st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), file_like(folder / name)))


@contextlib.contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    """Replace the content of a file within a context."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def refusal(action: Callable[[], Any], *errors: type[BaseException], seconds: int = 120) -> BaseException | None:
    """Call `action`; return None, or its error if that is exactly of one of these types, not of a subclass.

    After `seconds` it ends in TimeoutError.
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
    factor = int(os.environ.get("MOA_FUZZ_FACTOR", "20")) if thorough else 1

    @settings(
        max_examples=factor * examples,
        derandomize="MOA_FUZZ_FACTOR" not in os.environ,
        deadline=None,
        database=None,
        suppress_health_check=tuple(HealthCheck),
        phases=(Phase.generate, Phase.shrink) if thorough else (Phase.generate,),
    )
    @given(strategy)
    def attempt(example: Any) -> None:
        act(example)

    attempt()
