"""Names of shards: patterns of paths and URLs, and short names that stay the same when a data set moves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path

from webdataset.shardlists import expand_urls

from moa_train.errors import ConfigError
from moa_train.manifest import MANIFEST
from moa_vision import cache
from moa_vision.table import IMAGE_EXTENSIONS

_ALLOWED = "allowed are a folder of shards, or tars by path, brace or glob"
_PACK = "pack images first: python scripts/make_shards.py --source {} --out FOLDER"
_SHARD_NAME = re.compile(r"\.tar\b", re.IGNORECASE)


def expand(pattern: str, allowed: str = _ALLOWED) -> list[str]:
    """Return the manifests and shards that a pattern names, in order; see `moa_vision.index.open_index`.

    Raises ConfigError if there is none; `allowed` lists the alternatives in its message.
    """
    names: list[str] = []
    for part in expand_urls(pattern):  # "::" and braces, as in webdataset
        if part.startswith("file:") or not cache.is_remote(part):
            names += _expand_local(re.sub(r"^file:(//)?", "", part), allowed)
        elif "*" in part and not part.startswith(("http://", "https://")):
            fs, path = cache.filesystem(part)
            scheme = part.split("://")[0]
            names += [f"{scheme}://{found}" for found in sorted(fs.glob(path))]
        elif _SHARD_NAME.search(part.rsplit("/", 1)[-1]) or part.endswith(MANIFEST):
            names.append(part)
        else:
            names.append(f"{part.rstrip('/')}/{MANIFEST}")
    if not names:
        raise ConfigError(f"{pattern!r} matches no shard; {allowed}")
    return names


def short_names(urls: Sequence[str]) -> tuple[str, ...]:
    """Return the file names of shards without ".tar", with as many parent folders as make them unique.

    URLs that differ only elsewhere, such as in a query, stay whole.
    """
    plain = [url.split("?")[0] if cache.is_remote(url) else url for url in urls]
    paths = [re.sub(r"\.tar\b[^/]*$", "", url, flags=re.IGNORECASE).split("/") for url in plain]
    for depth in range(1, max(map(len, paths), default=0) + 1):
        names = tuple("/".join(path[-depth:]) for path in paths)
        if len(set(names)) == len(names):
            return names
    return tuple(urls)


def _expand_local(part: str, allowed: str) -> list[str]:
    path = Path(part).expanduser()
    if path.is_dir():
        return _expand_folder(path)
    if not has_magic(str(path)) and not path.exists():
        raise ConfigError(f"{part!r} does not exist; {allowed}")
    return sorted(glob(str(path), recursive=True))  # noqa: PTH207  (Path.glob rejects absolute patterns)


def _expand_folder(folder: Path) -> list[str]:
    if (folder / MANIFEST).exists():
        return [str(folder / MANIFEST)]
    found = sorted(str(child) for child in folder.iterdir() if child.suffix == ".tar")
    if not found:
        hint = "; give a folder of shards"
        if any(_is_image(file) for levels in ("*", "*/*", "*/*/*") for file in folder.glob(levels)):
            hint = f"; {_PACK.format(folder)}"
        raise ConfigError(f"folder {str(folder)!r} has no {MANIFEST} and no .tar file{hint}")
    return found


def _is_image(path: Path) -> bool:
    return path.suffix.lower()[1:] in IMAGE_EXTENSIONS
