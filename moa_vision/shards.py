"""Images -> tar shards, their index and a manifest: the data set that `moa_vision.index` reads.

A shard holds KEY.jpg (or KEY.npy), KEY.cls (where there is a label) and KEY.json of each sample, in webdataset's
layout. Which
sample lies where is a function of the source and the seed, so any number of processes writes the same bytes, and a
run that was stopped goes on: a finished shard is kept if its inputs and its checksum are the same as then.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from webdataset.writer import TarWriter

from moa_train.atomic_io import sync_file, sync_folder, write_json
from moa_train.errors import DataError
from moa_train.progress import CountBar
from moa_train.signals import end_with_parent
from moa_vision.cache import file_sha256
from moa_vision.images import MODES, crop_into, is_array, is_upright, open_image, read_array, to_mode
from moa_vision.index import MANIFEST, MANIFEST_FORMAT, MANIFEST_VERSION, parse_manifest
from moa_vision.sources import Item, Source, open_source
from moa_vision.table import SampleTable, index_tar

INDEX = "index.safetensors"

_PARTS = ".parts"  # what an unfinished run needs, beside its shards
_SMALL = 64  # pixels; an image with a shorter side keeps its colours at full resolution (CIFAR's would be 16 x 16)


@dataclass(frozen=True)
class ShardSettings:
    """What decides the bytes of shards, beside their source.

    Args:
        short_side: images are made smaller, never larger, to this short side in pixels; None: kept.
        quality: of the JPEG encoder; images that are JPEG already and keep their size keep their bytes.
        samples_per_shard: images of a shard, less those skipped.
        seed: of the order in which images are put into shards.
        channels: 3 and 1 make JPEGs, of any image (with 1 those encoded anew are grey). With other numbers, and for
            what only `moa_vision.images.read_array` reads, samples are uncompressed .npy of (H, W, C), and images
            of another number are skipped.
    """

    short_side: int | None = None
    quality: int = 95
    samples_per_shard: int = 1000
    seed: int = 0
    channels: int = 3

    def __post_init__(self) -> None:
        if self.short_side is not None and self.short_side < 1:
            raise ValueError(f"short_side is {self.short_side}; allowed: 1 or more pixels")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality}; allowed: 1 to 100")
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {self.samples_per_shard}; allowed: 1 or more")
        if self.channels < 1:
            raise ValueError(f"channels is {self.channels}; allowed: 1 or more")


class Report(NamedTuple):
    """A finished data set: its folder, its numbers of samples, shards and bytes, how many of the shards were there
    already, and the images that were skipped (each a dict of shard, source, reason)."""

    folder: Path
    samples: int
    shards: int
    bytes: int
    kept_shards: int
    skipped: list[dict[str, str]]


def make_shards(
    source: str,
    out: str | Path,
    settings: ShardSettings | None = None,
    *,
    val_fraction: float = 0.0,
    workers: int = 1,
    cache_dir: str | Path | None = None,
    image_key: str | None = None,
) -> list[Report]:
    """Packs a source into `out`, or into `out`/train and `out`/val.

    Args:
        source: see `moa_vision.sources.open_source`.
        out: folder, created if absent.
        settings: see `ShardSettings`.
        val_fraction: part of the images, drawn by the seed, that goes into a data set of its own; 0: none.
        workers: processes that decode and encode.
        cache_dir: for remote and compressed tars of the source.
        image_key: the image among the members of a tar's sample; see `moa_vision.sources.open_source`.

    Returns:
        One report, or those of train and val.

    Raises:
        ValueError: for a setting out of range, an empty source, or an `out` that holds something else.
        DataError: if no image of a data set can be used.
    """
    settings = settings or ShardSettings()
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; allowed: 0 or more, less than 1")
    opened = open_source(source, cache_dir, image_key)
    order = np.random.Generator(np.random.Philox(settings.seed)).permutation(len(opened.items))
    items = [opened.items[i] for i in order]
    opened.items = []  # a process that reads images needs none of it
    held_out = round(val_fraction * len(items))
    parts = {Path(out): items}
    if val_fraction:
        if not 0 < held_out < len(items):
            raise ValueError(f"val_fraction is {val_fraction}: of {len(items)} images it leaves one side empty")
        parts = {Path(out) / "train": items[held_out:], Path(out) / "val": items[:held_out]}
    return [_write_set(folder, opened, source, part, settings, workers) for folder, part in parts.items()]


def encode_image(image: bytes | Image.Image, settings: ShardSettings) -> tuple[str, bytes, dict[str, Any]]:
    """Turns an image into what a shard holds, no larger than asked for.

    Args:
        image: encoded as for `moa_vision.images.decode_image`, or decoded.
        settings: see `ShardSettings`.

    Returns:
        "jpg" or "npy", the file, and {"width", "height", "original_width", "original_height"} in pixels.

    Raises:
        ImageError: if the image cannot be read as such.
    """
    channels = settings.channels
    if channels in MODES and not (isinstance(image, bytes) and is_array(image, channels)):
        return "jpg", *encode_jpeg(image, settings.short_side, settings.quality, channels)
    return "npy", *encode_array(read_array(image, channels), settings.short_side)


def encode_array(array: np.ndarray, short_side: int | None) -> tuple[bytes, dict[str, Any]]:
    """As `encode_jpeg` of (H, W, C) uint8, uint16 or float32, as .npy of the same dtype."""
    height, width = array.shape[:2]
    size = _size_within(short_side, (width, height))
    if size != (width, height):
        wide = array.dtype == np.uint16  # which torch does not resize
        pixels = torch.from_numpy(np.array(array, np.float32 if wide else array.dtype, order="C"))
        resized = torch.empty(size[1], size[0], array.shape[2], dtype=pixels.dtype)
        crop_into(resized, pixels, (0, 0, height, width))
        array = resized.round().clamp(0, 65535).numpy().astype(np.uint16) if wide else resized.numpy()
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue(), _sizes(size, (width, height))


def encode_jpeg(
    image: bytes | Image.Image, short_side: int | None, quality: int, channels: int = 3
) -> tuple[bytes, dict[str, Any]]:
    """Turns an image into an upright RGB (or grey) JPEG, no larger than asked for.

    Args:
        image: encoded in one of `moa_vision.images.FORMATS`, or decoded.
        short_side: in pixels; larger images are resized by antialiased bicubic interpolation; None: kept.
        quality: of the JPEG encoder, if the image is encoded anew.
        channels: 3, or 1 for grey, if the image is encoded anew.

    Returns:
        The JPEG, and {"width", "height", "original_width", "original_height"} in pixels.

    Raises:
        ImageError: if the image cannot be read or has no known range.
    """
    decoded = open_image(image) if isinstance(image, bytes) else image
    fits = _size_within(short_side, decoded.size) == decoded.size
    original = decoded.size
    plain = decoded.format == "JPEG" and decoded.mode in MODES.values()
    if isinstance(image, bytes) and plain and fits and is_upright(decoded):
        jpeg = image
    else:
        decoded = to_mode(decoded, channels)
        original = decoded.size
        if not fits:
            decoded = decoded.resize(_size_within(short_side, original), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        chroma = "4:4:4" if min(decoded.size) < _SMALL or channels == 1 else "4:2:0"
        decoded.save(buffer, "JPEG", quality=quality, subsampling=chroma)
        jpeg = buffer.getvalue()
    return jpeg, _sizes(decoded.size, original)


def _size_within(short_side: int | None, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of an image that is made no larger than `short_side`."""
    if short_side is None or min(size) <= short_side:
        return size
    scale = short_side / min(size)
    return max(short_side, round(size[0] * scale)), max(short_side, round(size[1] * scale))


def _sizes(size: tuple[int, int], original: tuple[int, int]) -> dict[str, Any]:
    return dict(zip(("width", "height", "original_width", "original_height"), size + original, strict=True))


class ShardWriter:
    """Writes single shards; the same in any process.

    Args:
        source: that reads the images.
        folder: of the data set.
        settings: of the shards.
        finished: records of shards written by an earlier run.
    """

    def __init__(
        self, source: Source, folder: Path, settings: ShardSettings, finished: dict[str, dict[str, Any]]
    ) -> None:
        self.source = source
        self.folder = folder
        self.settings = settings
        self.finished = finished

    def __call__(self, name: str, items: list[Item]) -> tuple[dict[str, Any], bytes, bool]:
        """Writes the shard `name` of `items` unless it is there.

        Returns:
            The shard's record for the manifest, its rows as `SampleTable.to_bytes`, and whether it was there.
        """
        path, record_path = self.folder / name, self.folder / _PARTS / f"{name}.json"
        inputs = self._inputs(items)
        record = self.finished.get(name)
        kept = record is not None and record.get("inputs") == inputs and _is_whole(path, record)
        if record is None or not kept:
            record_path.unlink(missing_ok=True)
            temporary = self.folder / _PARTS / f"{name}.tmp"
            skipped = self._write(temporary, name, items)
            sync_file(temporary)
            record = {
                "name": name,
                "samples": len(items) - len(skipped),
                "size": temporary.stat().st_size,
                "sha256": file_sha256(temporary),
                "inputs": inputs,
                "skipped": skipped,
            }
            temporary.replace(path)
            sync_folder(self.folder)
            write_json(record_path, record)
        return record, index_tar(path)[0].to_bytes(), kept

    def _write(self, path: Path, name: str, items: list[Item]) -> list[dict[str, str]]:
        """Writes a tar; returns what could not be packed."""
        skipped = []
        with path.open("wb") as file, TarWriter(file, user="", group="", mtime=0, encoder=False) as tar:
            for item in items:
                try:
                    raw = self.source.read(item)
                    kind, data, sizes = encode_image(raw.image, self.settings)
                except Exception as error:  # of any library that a source reads with; one image must not end it all
                    reason = str(error) or type(error).__name__
                    skipped.append({"shard": name, "source": item.name, "reason": reason})
                    continue
                about = {**raw.extra, **sizes, "source": item.name}
                sample = {"__key__": item.key, kind: data, "json": json.dumps(about, sort_keys=True).encode()}
                if raw.label is not None:
                    sample["cls"] = str(raw.label).encode()
                tar.write(sample)
        return skipped

    def _inputs(self, items: list[Item]) -> str:
        """A fingerprint of everything that decides the shard's bytes."""
        digest = hashlib.sha256(json.dumps(asdict(self.settings)).encode())
        for item in items:
            try:
                state: tuple[Any, ...] = self.source.state(item)
            except OSError as error:  # the file went away; reading it will name it
                state = (str(error),)
            digest.update(repr((item.key, item.name, state)).encode())
        return digest.hexdigest()


def _write_set(
    folder: Path, source: Source, name: str, items: list[Item], settings: ShardSettings, workers: int
) -> Report:
    """Writes a whole data set: shards, then the index, then the manifest that makes it valid."""
    step = settings.samples_per_shard
    tasks = {f"shard-{n // step:06d}.tar": items[n : n + step] for n in range(0, len(items), step)}
    with _exclusive(folder):
        finished = _finished_shards(folder, settings)
        writer = ShardWriter(source, folder, settings, finished)
        results = {}
        with CountBar(total=len(items), title=str(folder), unit="img") as bar:
            for task, result in _run(writer, tasks, workers):
                results[task] = result
                bar.update(len(tasks[task]))
        records = [results[task][0] for task in tasks]
        skipped = [entry for record in records for entry in record["skipped"]]
        if len(skipped) == len(items):
            raise DataError(f"none of the {len(items)} images of {name} can be used; the first: {skipped[0]}")
        index = SampleTable.concatenate([SampleTable.from_bytes(results[task][1])[0] for task in tasks]).to_bytes()
        _publish(folder, name, source.label_names, settings, records, index)
        for stale in set(finished) - set(tasks):  # of an earlier run over more images
            (folder / stale).unlink(missing_ok=True)
        shutil.rmtree(folder / _PARTS)
    return Report(
        folder,
        len(items) - len(skipped),
        len(records),
        sum(record["size"] for record in records),
        sum(kept for _, _, kept in results.values()),
        skipped,
    )


def _publish(
    folder: Path,
    name: str,
    label_names: tuple[str, ...],
    settings: ShardSettings,
    records: list[dict[str, Any]],
    index: bytes,
) -> None:
    temporary = folder / _PARTS / INDEX
    temporary.write_bytes(index)
    sync_file(temporary)
    manifest = {
        "format": MANIFEST_FORMAT,
        "version": MANIFEST_VERSION,
        "source": name,
        "settings": asdict(settings),
        "samples": sum(record["samples"] for record in records),
        "bytes": sum(record["size"] for record in records),
        "label_names": list(label_names),
        "index": {"name": INDEX, "size": len(index), "sha256": hashlib.sha256(index).hexdigest()},
        "shards": [{k: v for k, v in record.items() if k != "skipped"} for record in records],
        "skipped": [entry for record in records for entry in record["skipped"]],
    }
    temporary.replace(folder / INDEX)
    write_json(folder / MANIFEST, manifest)


def _finished_shards(folder: Path, settings: ShardSettings) -> dict[str, dict[str, Any]]:
    """The records of the shards that an earlier run finished, from its manifest and its parts.

    Raises ValueError if the folder holds a data set with other settings, which is not ours to replace.
    """
    records: dict[str, dict[str, Any]] = {}
    try:
        manifest = parse_manifest((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        pass
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST} is not one of ours ({error}); choose another folder") from error
    else:
        if manifest.get("settings") != asdict(settings):
            raise ValueError(
                f"{folder} holds a data set made with {manifest.get('settings')}, not {asdict(settings)}; "
                "choose another folder, or delete it first"
            )
        every = manifest.get("skipped")
        if not _is_skipped(every):
            raise ValueError(f'{folder / MANIFEST} is not one of ours (field "skipped"); choose another folder')
        for record in manifest["shards"]:
            skipped = [entry for entry in every if entry["shard"] == record["name"]]
            records[record["name"]] = {**record, "skipped": skipped}
    for path in sorted((folder / _PARTS).glob("*.tar.json")):
        if record := _part(path):
            records[record["name"]] = record
    return records


def _part(path: Path) -> dict[str, Any] | None:
    """The record of a shard that a run finished; None for a damaged one, whose shard is then packed again."""
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    fine = (
        isinstance(record, dict)
        and record.get("name") == path.name.removesuffix(".json")  # shards of records are replaced, or deleted
        and all(type(record.get(key)) is int and record[key] >= 0 for key in ("samples", "size"))
        and isinstance(record.get("sha256"), str)
        and _is_skipped(record.get("skipped"))
    )
    return record if fine else None


def _is_skipped(entries: Any) -> TypeGuard[list[dict[str, str]]]:
    """Whether it is a list of samples that were left out."""
    keys = ("shard", "source", "reason")
    return isinstance(entries, list) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in keys) for entry in entries
    )


def _run(
    writer: ShardWriter, tasks: dict[str, list[Item]], workers: int
) -> Iterator[tuple[str, tuple[dict[str, Any], bytes, bool]]]:
    """The tasks' results as they come."""
    if workers <= 1:
        for name, items in tasks.items():
            yield name, writer(name, items)
        return
    with ProcessPoolExecutor(min(workers, len(tasks)), initializer=_begin, initargs=(writer,)) as pool:
        futures: dict[Future[Any], str] = {pool.submit(_work, name, items): name for name, items in tasks.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


_writer: ShardWriter | None = None  # of a worker process


def _begin(writer: ShardWriter) -> None:
    global _writer
    end_with_parent()
    _writer = writer


def _work(name: str, items: list[Item]) -> tuple[dict[str, Any], bytes, bool]:
    assert _writer is not None
    return _writer(name, items)


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Takes the folder for this run. Raises ValueError if it holds other tars or another run writes to it."""
    parts = folder / _PARTS
    if not parts.exists() and not (folder / MANIFEST).exists() and list(folder.glob("*.tar")):
        raise ValueError(f"{folder} holds tars that no manifest lists; choose another folder")
    parts.mkdir(parents=True, exist_ok=True)
    lock = FileLock(parts / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"{folder} is being written by another run; wait for it, or choose another") from error
    try:
        yield
    finally:
        lock.release()


def _is_whole(path: Path, record: dict[str, Any]) -> bool:
    """Whether the shard's bytes are those of its record."""
    try:
        return path.stat().st_size == record["size"] and file_sha256(path) == record["sha256"]
    except OSError:
        return False
