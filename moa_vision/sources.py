"""Sources of images to be packed: folders, tars, torchvision and Hugging Face data sets.

A source lists its images as `items`, which are cheap to send to another process, and reads one at a time.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from PIL import Image

from moa_train.errors import ConfigError, DataError
from moa_train.manifest import MANIFEST
from moa_train.progress import CountBar
from moa_vision.cache import Shard, ShardCache, default_cache_dir, short_hash
from moa_vision.images import ImageError
from moa_vision.index import expand, load_manifest, manifest_shard, short_names
from moa_vision.table import IMAGE_EXTENSIONS, Member, image_member, scan_tar

log = logging.getLogger(__name__)


class Item(NamedTuple):
    """One image of a source: its key in the shard, its name in reports, and what the source needs to read it."""

    key: str
    name: str
    where: tuple[Any, ...]


class RawSample(NamedTuple):
    """An image as the source stores it (encoded or decoded), its label or None, and further fields of its JSON."""

    image: bytes | Image.Image
    label: int | None
    extra: dict[str, Any]


class Source:
    """A set of images.

    Attributes:
        items: The images in a fixed order.
        label_names: Names of the labels 0, 1, ...; empty if unknown.
    """

    items: list[Item]
    label_names: tuple[str, ...] = ()

    def read(self, item: Item) -> RawSample:
        """Read one image; any exception means that it is unreadable."""
        raise NotImplementedError

    def fingerprint(self, item: Item) -> tuple[Any, ...]:
        """Return values that change with the image, as far as is known without reading it."""
        return ()


def open_source(text: str, cache_dir: str | Path | None = None, image_key: str | None = None) -> Source:
    """Open the source that `text` names.

    Args:
        text: A folder of images (its subfolders are the classes) | tars as in `moa_vision.index.open_index` |
            torchvision:NAME:root=DIR[:split=train][:ARGUMENT=VALUE...] | hf:NAME[:config=NAME][:split=train].
        cache_dir: Cache of remote tars.
        image_key: Image member of a tar's samples, as in `moa_vision.table.image_member`, or column of a Hugging Face
            data set.

    Raises:
        ConfigError: `text` does not name a source.
        DataError: The source has no image, or cannot be read.
    """
    if text.startswith("torchvision:"):
        source: Source = TorchvisionSource(text)
    elif text.startswith("hf:") and not text.startswith("hf://"):
        source = HubSource(text, image_key)
    elif Path(text).is_dir() and not (Path(text) / MANIFEST).exists() and not list(Path(text).glob("*.tar*")):
        source = FolderSource(Path(text))
    else:
        source = TarSource(text, Path(cache_dir) if cache_dir else default_cache_dir(), image_key)
    if not source.items:
        raise DataError(f"source {text!r} has no image ({', '.join(IMAGE_EXTENSIONS)})")
    return source


class FolderSource(Source):
    """Image files below a folder; the first folder below it is the class. Other files are counted and ignored."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found = (Path(path, name) for path, _, names in os.walk(folder, followlinks=True) for name in names)
        files = sorted(file.relative_to(folder) for file in found)
        images = [file for file in files if file.suffix.lower()[1:] in IMAGE_EXTENSIONS]
        if others := Counter(file.suffix or "no suffix" for file in files) - Counter(file.suffix for file in images):
            suffixes = ", ".join(f"{suffix} ({count})" for suffix, count in others.most_common())
            log.warning("%d files below %s are not images and are ignored: %s", others.total(), folder, suffixes)
        self.label_names = tuple(sorted({file.parts[0] for file in images if len(file.parts) > 1}))
        labels = {name: number for number, name in enumerate(self.label_names)}
        keys = _unique_keys([str(file.with_suffix("")) for file in images])
        self.items = [
            Item(key, str(file), (labels.get(file.parts[0]) if len(file.parts) > 1 else None,))
            for key, file in zip(keys, images, strict=True)
        ]

    def read(self, item: Item) -> RawSample:
        """Read one image and its label."""
        return RawSample((self.folder / item.name).read_bytes(), item.where[0], {})

    def fingerprint(self, item: Item) -> tuple[Any, ...]:
        """Return values that change with the image."""
        stat = (self.folder / item.name).stat()
        return stat.st_size, stat.st_mtime_ns


class TarSource(Source):
    """Samples of existing shards with their labels and JSON."""

    def __init__(self, pattern: str, cache_dir: Path, image_key: str | None = None) -> None:
        self.image_key = image_key
        shards: list[Shard] = []
        for name in expand(pattern):
            if name.endswith(MANIFEST):
                manifest = load_manifest(name)
                shards += [manifest_shard(name, entry) for entry in manifest["shards"]]
                self.label_names = self.label_names or tuple(manifest["label_names"])
            else:
                shards.append(Shard(name))
        cache = ShardCache(cache_dir)
        rows: list[tuple[str, str, tuple[Any, ...]]] = []
        with CountBar(total=len(shards), title="reading shards", unit="shard") as bar:
            for shard, short in zip(shards, short_names([shard.url for shard in shards]), strict=True):
                path = cache.fetch(shard)
                for key, members in scan_tar(path, shard.url)[0].items():
                    rows.append((key, f"{short}/{key}", (path, members)))
                bar.update()
        keys = _unique_keys([row[0] for row in rows])
        self.items = [Item(key, name, where) for key, (_, name, where) in zip(keys, rows, strict=True)]

    def read(self, item: Item) -> RawSample:
        """Read one image and its label."""
        path, members = item.where
        image = image_member(members, self.image_key)
        try:
            label = int(_read(path, members["cls"])) if "cls" in members else None
            extra = json.loads(_read(path, members["json"])) if "json" in members else {}
        except (ValueError, RecursionError) as error:
            raise ImageError(f"its .cls is not a number or its .json is not valid: {error}") from error
        return RawSample(_read(path, image), label, extra if isinstance(extra, dict) else {"json": extra})

    def fingerprint(self, item: Item) -> tuple[Any, ...]:
        """Return values that change with the image."""
        path, members = item.where
        stat = path.stat()
        return stat.st_size, stat.st_mtime_ns, sorted(members.items()), self.image_key


class TorchvisionSource(Source):
    """A data set of torchvision.datasets that yields (image, label)."""

    def __init__(self, text: str) -> None:
        from torchvision import datasets

        name, arguments = _parse(text)
        kind = getattr(datasets, name, None)
        if not (isinstance(kind, type) and issubclass(kind, datasets.VisionDataset)):
            raise ConfigError(f"source {text!r}: torchvision.datasets has no data set {name!r}")
        if "split" in arguments and "train" in kind.__init__.__annotations__:  # CIFAR10 and MNIST have train=bool
            split = arguments.pop("split")
            if split not in ("train", "test", "val"):
                raise ConfigError(f"source {text!r}: split is {split!r}; allowed are train and test")
            arguments["train"] = split == "train"
        try:
            self.data: Any = kind(**arguments)
        except (TypeError, RuntimeError, ImportError) as error:  # wrong arguments; absent data or packages
            raise ConfigError(f"source {text!r}: {error}") from error
        self.label_names = tuple(map(str, getattr(self.data, "classes", ())))
        self.items = [Item(f"{i:08d}", f"{name}[{i}]", (i,)) for i in range(len(self.data))]

    def read(self, item: Item) -> RawSample:
        """Read one image and its label."""
        image, label = self.data[item.where[0]]
        return RawSample(image, label if isinstance(label, int) else None, {})


class HubSource(Source):
    """A data set of Hugging Face `datasets`, on the Hub or in a folder.

    The images are column `image_key`, by default the first image column.
    """

    def __init__(self, text: str, image_key: str | None = None) -> None:
        import datasets

        name, arguments = _parse(text)
        if unknown := sorted(set(arguments) - {"config", "split"}):
            raise ConfigError(f"source {text!r}: unknown argument {unknown[0]!r}; allowed are config and split")
        try:
            data = datasets.load_dataset(name, arguments.get("config"), split=str(arguments.get("split", "train")))
        except (OSError, ValueError) as error:
            raise DataError(f"source {text!r}: {error}") from error
        columns = data.features or {}
        images = [column for column, kind in columns.items() if isinstance(kind, datasets.Image)]
        if image_key:
            images = [image_key] if image_key in images else []
        if not images:
            wanted = f"image column {image_key!r}" if image_key else "image column"
            raise ConfigError(f"source {text!r} has no {wanted}, only {', '.join(columns)}")
        labels = [column for column, kind in columns.items() if isinstance(kind, datasets.ClassLabel)]
        self.image, self.label = images[0], labels[0] if labels else None
        self.data: Any = data.cast_column(self.image, datasets.Image(decode=False))
        self.label_names = tuple(columns[self.label].names) if self.label else ()
        self.items = [Item(f"{i:08d}", f"{name}[{i}]", (i,)) for i in range(len(self.data))]

    def read(self, item: Item) -> RawSample:
        """Read one image and its label."""
        row = self.data[item.where[0]]
        encoded = row[self.image]
        data = encoded["bytes"] if encoded["bytes"] is not None else Path(encoded["path"]).read_bytes()
        return RawSample(data, row[self.label] if self.label else None, {})

    def fingerprint(self, item: Item) -> tuple[Any, ...]:
        """Return values that change with the image."""
        return (self.data._fingerprint,)


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    """Parse KIND:NAME:ARGUMENT=VALUE:... into NAME and the arguments, whose values are YAML."""
    _, name, *rest = text.split(":")
    if not name or not all("=" in argument for argument in rest):
        raise ConfigError(f"source {text!r} must have the form KIND:NAME[:ARGUMENT=VALUE...]")
    arguments = {}
    for key, value in (argument.split("=", 1) for argument in rest):
        try:
            arguments[key] = yaml.safe_load(value)
        except Exception as error:  # yaml raises many types for tags
            raise ConfigError(f"source {text!r}: {key} is {value!r}, which is not valid YAML; quote it") from error
    return name, arguments


def _unique_keys(names: list[str]) -> list[str]:
    """Return names as unique keys: short, of plain characters, without the dot that ends a key in webdataset."""
    keys: dict[str, None] = {}
    attempts: Counter[str] = Counter()
    for name in names:
        plain = key = re.sub(r"[^A-Za-z0-9_-]", "_", name)
        while len(key) > 80 or key in keys:
            key = f"{plain[:64]}-{short_hash(name, attempts[name])[:12]}"
            attempts[name] += 1
        keys[key] = None
    return list(keys)


def _read(path: Path, member: Member) -> bytes:
    offset, size = member
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
