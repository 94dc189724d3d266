"""Where images to be packed come from: folders, tars, torchvision's and Hugging Face's data sets.

A source lists its images as `items`, cheap to send to another process, and reads one at a time.
"""

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import yaml
from PIL import Image

from moa_train.progress import CountBar
from moa_vision import cache
from moa_vision.cache import Shard
from moa_vision.images import FORMATS, ImageError
from moa_vision.index import MANIFEST, expand, read_manifest, short_names
from moa_vision.table import IMAGE_EXTENSIONS, Member, image_member, scan_tar

log = logging.getLogger(__name__)

_ALLOWED = "allowed are a folder of images, tars by path, brace or glob, torchvision:NAME and hf:NAME"
_LISTED = 8  # suffixes that a message names


class Item(NamedTuple):
    """One image of a source: its key in the shard, its name for reports, and what the source needs to read it."""

    key: str
    name: str
    where: tuple[Any, ...]


class Raw(NamedTuple):
    """An image as the source has it (encoded, or decoded), its label or None, and what else its JSON shall say."""

    image: bytes | Image.Image
    label: int | None
    extra: dict[str, Any]


class Source(Protocol):
    """A set of images."""

    items: list[Item]
    label_names: tuple[str, ...]

    def read(self, item: Item) -> Raw:
        """Reads one image; raises whatever shows that it cannot be read."""
        ...

    def state(self, item: Item) -> tuple[Any, ...]:
        """What changes when the image does, as far as that can be seen without reading it."""
        ...


def open_source(text: str, cache_dir: str | Path | None = None, image_key: str | None = None) -> Source:
    """The source that `text` names.

    Args:
        text: a folder of images (the folders in it are the classes) | tars as in `open_index` |
            torchvision:NAME:root=DIR[:split=train][:ARGUMENT=VALUE...] | hf:NAME[:config=NAME][:split=train].
        cache_dir: for remote and compressed tars.
        image_key: which member of a tar's sample is the image, as in `moa_vision.table.image_member`; or which column
            of a Hugging Face data set.

    Raises:
        ValueError: if it names none, or an empty one.
    """
    if text.startswith("torchvision:"):
        source: Source = TorchvisionSource(text)
    elif text.startswith("hf:") and not text.startswith("hf://"):
        source = HubSource(text, image_key)
    elif Path(text).is_dir() and not (Path(text) / MANIFEST).exists() and not list(Path(text).glob("*.tar*")):
        source = FolderSource(Path(text))
    else:
        source = TarSource(text, cache.default_cache_dir() if cache_dir is None else Path(cache_dir), image_key)
    if not source.items:
        raise ValueError(f"source {text!r} holds no image ({', '.join(IMAGE_EXTENSIONS)})")
    return source


class FolderSource:
    """Image files below a folder, links followed (not in circles); the first folder on the way is the class.

    What is left out, as no image by its suffix (without one: by its first bytes), is logged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found, others = [], Counter[str]()
        for file in _files_below(folder):
            if _is_image(file):
                found.append(file.relative_to(folder))
            else:
                others[file.suffix.lower() or "no suffix"] += 1
        found.sort()
        if others:
            suffixes = ", ".join(f"{suffix} ({count})" for suffix, count in others.most_common(_LISTED))
            log.warning("%d files below %s are left out, being no images: %s", others.total(), folder, suffixes)
        classes = [file.parts[0] if len(file.parts) > 1 else None for file in found]
        self.label_names = tuple(sorted({name for name in classes if name is not None}))
        labels = {name: number for number, name in enumerate(self.label_names)}
        keys = _keys([str(file.with_suffix("")) for file in found])
        self.items = [
            Item(key, str(file), (None if name is None else labels[name],))
            for key, file, name in zip(keys, found, classes, strict=True)
        ]

    def read(self, item: Item) -> Raw:
        """See `Source`."""
        return Raw((self.folder / item.name).read_bytes(), item.where[0], {})

    def state(self, item: Item) -> tuple[Any, ...]:
        """See `Source`."""
        stat = (self.folder / item.name).stat()
        return stat.st_size, stat.st_mtime_ns


class TarSource:
    """Samples of existing shards, with their labels and JSON."""

    def __init__(self, pattern: str, cache_dir: Path, image_key: str | None = None) -> None:
        self.image_key = image_key
        shards: list[Shard] = []
        self.label_names: tuple[str, ...] = ()
        for name in expand(pattern, _ALLOWED):
            if name.endswith(MANIFEST):
                listed = read_manifest(name, cache_dir, whole=True)
                shards += listed.shards
                self.label_names = self.label_names or listed.label_names
            else:
                shards.append(Shard(name))
        rows: list[tuple[str, str, tuple[Any, ...]]] = []
        with CountBar(total=len(shards), title="reading shards", unit="shard") as bar:
            for shard, short in zip(shards, short_names([shard.url for shard in shards]), strict=True):
                path = cache.local_path(shard, cache_dir)
                for key, members in scan_tar(path, shard.url)[0].items():
                    rows.append((key, f"{short}/{key}", (path, members)))
                bar.update()
        keys = _keys([row[0] for row in rows])
        self.items = [Item(key, name, where) for key, (_, name, where) in zip(keys, rows, strict=True)]

    def read(self, item: Item) -> Raw:
        """See `Source`. Raises ImageError if the sample lacks an image or has a malformed label or JSON."""
        path, members = item.where
        image = image_member(members, self.image_key)
        try:
            label = int(_read(path, members["cls"])) if "cls" in members else None
            extra = json.loads(_read(path, members["json"])) if "json" in members else {}
        except (ValueError, RecursionError) as error:
            raise ImageError(f"its .cls is no number or its .json no JSON: {error}") from error
        return Raw(_read(path, image), label, extra if isinstance(extra, dict) else {"json": extra})

    def state(self, item: Item) -> tuple[Any, ...]:
        """See `Source`."""
        path, members = item.where
        stat = path.stat()
        return stat.st_size, stat.st_mtime_ns, sorted(members.items()), self.image_key


class TorchvisionSource:
    """A data set class of torchvision.datasets that yields (image, label)."""

    def __init__(self, text: str) -> None:
        from torchvision import datasets

        name, arguments = _parse(text)
        kind = getattr(datasets, name, None)
        if not (isinstance(kind, type) and issubclass(kind, datasets.VisionDataset)):
            raise ValueError(f"source {text!r}: torchvision.datasets has no data set {name!r}")
        if "split" in arguments and "train" in kind.__init__.__annotations__:  # CIFAR10 and MNIST say train=bool
            split = arguments.pop("split")
            if split not in ("train", "test", "val"):
                raise ValueError(f"source {text!r}: split is {split!r}; allowed: train, test")
            arguments["train"] = split == "train"
        try:
            self.data: Any = kind(**arguments)
        except ImportError as error:
            raise ValueError(f"source {text!r}: {error}; install it, as by pip install {error.name}") from error
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"source {text!r}: {error}") from error
        self.label_names = tuple(map(str, getattr(self.data, "classes", ())))
        self.items = [Item(f"{i:08d}", f"{name}[{i}]", (i,)) for i in range(len(self.data))]

    def read(self, item: Item) -> Raw:
        """See `Source`."""
        image, label = self.data[item.where[0]]
        return Raw(image, label if isinstance(label, int) else None, {})

    def state(self, item: Item) -> tuple[Any, ...]:
        """See `Source`."""
        return ()


class HubSource:
    """A data set that `datasets.load_dataset` finds, on the Hub or in a folder.

    Its images are column `image_key`, by default the first of images.
    """

    def __init__(self, text: str, image_key: str | None = None) -> None:
        import datasets

        name, arguments = _parse(text)
        unknown = sorted(set(arguments) - {"config", "split"})
        if unknown:
            raise ValueError(f"source {text!r}: {unknown[0]!r} is unknown; allowed: config, split")
        try:
            data = datasets.load_dataset(name, arguments.get("config"), split=str(arguments.get("split", "train")))
        except (OSError, ValueError) as error:
            raise ValueError(f"source {text!r}: {error}") from error
        kinds = data.features or {}
        images = [column for column, kind in kinds.items() if isinstance(kind, datasets.Image)]
        if image_key:
            images = [image_key] if image_key in images else []
        if not images:
            wanted = f"image column {image_key!r}" if image_key else "image column"
            raise ValueError(f"source {text!r} has no {wanted}, only {', '.join(kinds)}")
        labels = [column for column, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
        self.image, self.label = images[0], labels[0] if labels else None
        self.data: Any = data.cast_column(self.image, datasets.Image(decode=False))
        self.label_names = tuple(kinds[self.label].names) if self.label else ()
        self.items = [Item(f"{i:08d}", f"{name}[{i}]", (i,)) for i in range(len(self.data))]

    def read(self, item: Item) -> Raw:
        """See `Source`."""
        row = self.data[item.where[0]]
        encoded = row[self.image]
        data = encoded["bytes"] if encoded["bytes"] is not None else Path(encoded["path"]).read_bytes()
        return Raw(data, row[self.label] if self.label else None, {})

    def state(self, item: Item) -> tuple[Any, ...]:
        """See `Source`."""
        return (self.data._fingerprint,)  # of the data and all that was done to it


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    """KIND:NAME:ARGUMENT=VALUE:... -> NAME and the arguments, their values as YAML reads them."""
    _, name, *rest = text.split(":")
    if not name or not all("=" in argument for argument in rest):
        raise ValueError(f"source {text!r}: allowed is KIND:NAME[:ARGUMENT=VALUE...]")
    arguments = {}
    for key, value in (argument.split("=", 1) for argument in rest):
        try:
            arguments[key] = yaml.safe_load(value)
        except Exception as error:  # besides its own errors yaml's tags raise AttributeError, ValueError, ...
            raise ValueError(f"source {text!r}: {key} is {value!r}, which is no YAML; put it in quotes") from error
    return name, arguments


def _is_image(file: Path) -> bool:
    """Whether a file is an image by its suffix; without one, by its first bytes."""
    if file.suffix or not file.is_file():
        return file.suffix.lower()[1:] in IMAGE_EXTENSIONS
    try:
        with Image.open(file, formats=FORMATS):
            return True
    except Exception:  # PIL's readers raise many types
        return False


def _files_below(folder: Path) -> Iterator[Path]:
    """All files below `folder`, links followed, except into a folder that is on the way already."""
    on_way: dict[str, frozenset[tuple[int, int]]] = {}
    for at, folders, names in os.walk(folder, followlinks=True):
        stat = Path(at).stat()
        here, above = (stat.st_dev, stat.st_ino), on_way.get(str(Path(at).parent), frozenset())
        if here in above:
            folders.clear()
            continue
        on_way[str(Path(at))] = above | {here}
        yield from (Path(at) / name for name in names)


def _keys(names: list[str]) -> list[str]:
    """Names as keys: short, plain characters, no dot (webdataset ends a key there), no two alike."""
    keys: dict[str, None] = {}
    attempts: Counter[str] = Counter()  # a name may occur in every tar
    for name in names:
        plain = key = re.sub(r"[^A-Za-z0-9_-]", "_", name)
        while len(key) > 80 or key in keys:
            key = f"{plain[:64]}-{cache.short_hash(name, attempts[name])[:12]}"
            attempts[name] += 1
        keys[key] = None
    return list(keys)


def _read(path: Path, member: Member) -> bytes:
    with path.open("rb") as file:
        return os.pread(file.fileno(), member[1], member[0])
