"""Packing of images into tar shards with an index and a manifest, which `moa_vision.index` reads.

A shard holds KEY.jpg (or KEY.npy), KEY.cls (if labelled) and KEY.json of each sample, in webdataset's layout. The place
of every sample is a function of the source and the seed, so any number of processes writes the same bytes. An
interrupted run continues: a finished shard is kept if its inputs and checksum are unchanged.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moa_train.atomic_io import sync_file, sync_folder, write_bytes, write_json
from moa_train.errors import ConfigError, DataError, require
from moa_train.manifest import MANIFEST, check_entry, file_entry, file_problem, read_manifest, write_manifest
from moa_train.progress import CountBar
from moa_train.signals import end_with_parent
from moa_vision.encoding import ShardSettings, encode_image
from moa_vision.index import COUNTS, FORMAT
from moa_vision.sources import Item, Source, open_source
from moa_vision.table import SampleTable, index_tar

INDEX = "index.safetensors"

_PARTS = ".parts"  # work files of an unfinished run


class Report(NamedTuple):
    """Summary of a packed data set; `skipped` has {"source", "reason"} of each skipped image."""

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
    """Pack a source into `out`, or into `out`/train and `out`/val; return one report, or those of train and val.

    Args:
        source: See `moa_vision.sources.open_source`, also for `cache_dir` and `image_key`.
        out: Output folder, created if absent.
        settings: See `ShardSettings`.
        val_fraction: Fraction of the images, drawn by the seed, that goes into the validation set; 0: none.
        workers: Processes that decode and encode.

    Raises:
        ConfigError: A setting is out of range, or `out` holds something else.
        DataError: The source is empty, or a set has no usable image.
    """
    settings = settings or ShardSettings()
    require("val_fraction", val_fraction, 0 <= val_fraction < 1, "0 or above, less than 1")
    opened = open_source(source, cache_dir, image_key)
    order = np.random.Generator(np.random.Philox(settings.seed)).permutation(len(opened.items))
    items = [opened.items[i] for i in order]
    opened.items = []  # keeps the source cheap to send to workers
    parts = {Path(out): items}
    if val_fraction:
        held_out = round(val_fraction * len(items))
        if not 0 < held_out < len(items):
            raise ConfigError(f"val_fraction is {val_fraction}, which leaves one side of {len(items)} images empty")
        parts = {Path(out) / "train": items[held_out:], Path(out) / "val": items[:held_out]}
    return [_write_set(folder, opened, source, part, settings, workers) for folder, part in parts.items()]


class PackedShard(NamedTuple):
    """A finished shard: its manifest entry, its rows, and whether an earlier run wrote it."""

    entry: dict[str, Any]
    table: SampleTable
    kept: bool


@dataclass(frozen=True)
class ShardWriter:
    """A writer of single shards, with the same result in any process; `finished` are entries of an earlier run."""

    source: Source
    folder: Path
    settings: ShardSettings
    finished: dict[str, dict[str, Any]]

    def write(self, name: str, items: list[Item]) -> PackedShard:
        """Write the shard `name` of `items`, unless an earlier run did."""
        path, inputs = self.folder / name, self._inputs(items)
        entry = self.finished.get(name)
        kept = entry is not None and entry.get("inputs") == inputs and path.exists() and not file_problem(path, entry)
        if entry is None or not kept:
            temporary = self.folder / _PARTS / f"{name}.tmp"
            skipped = self._write_tar(temporary, items)
            sync_file(temporary)
            samples = len(items) - len(skipped)
            entry = file_entry(temporary, name, samples=samples, inputs=inputs, skipped=skipped)
            temporary.replace(path)
            sync_folder(self.folder)
            write_json(self.folder / _PARTS / f"{name}.json", entry)
        return PackedShard(entry, index_tar(path), kept)

    def _write_tar(self, path: Path, items: list[Item]) -> list[dict[str, str]]:
        """Write a tar and return the skipped images."""
        from webdataset.writer import TarWriter  # late: training steps need no webdataset

        skipped = []
        with path.open("wb") as file, TarWriter(file, user="", group="", mtime=0, encoder=False) as tar:
            for item in items:
                try:
                    raw = self.source.read(item)
                    kind, data, sizes = encode_image(raw.image, self.settings)
                except Exception as error:  # sources and decoders raise many types; one image must not end the run
                    skipped.append({"source": item.name, "reason": str(error) or type(error).__name__})
                    continue
                about = {**raw.extra, **sizes, "source": item.name}
                sample = {"__key__": item.key, kind: data, "json": json.dumps(about, sort_keys=True).encode()}
                if raw.label is not None:
                    sample["cls"] = str(raw.label).encode()
                tar.write(sample)
        return skipped

    def _inputs(self, items: list[Item]) -> str:
        """Return a fingerprint of everything that determines the shard's bytes."""
        digest = hashlib.sha256(json.dumps(asdict(self.settings)).encode())
        for item in items:
            try:
                state: tuple[Any, ...] = self.source.fingerprint(item)
            except OSError as error:  # the file has vanished; reading it reports that
                state = (str(error),)
            digest.update(repr((item.key, item.name, state)).encode())
        return digest.hexdigest()


def _write_set(
    folder: Path, source: Source, name: str, items: list[Item], settings: ShardSettings, workers: int
) -> Report:
    """Write a data set: shards, then the index, then the manifest that makes it valid."""
    step = settings.samples_per_shard
    tasks = {f"shard-{n // step:06d}.tar": items[n : n + step] for n in range(0, len(items), step)}
    packed: list[PackedShard] = []
    if not (folder / _PARTS).exists() and not (folder / MANIFEST).exists() and list(folder.glob("*.tar")):
        raise ConfigError(f"{folder} has tars but no manifest; choose another folder")
    (folder / _PARTS).mkdir(parents=True, exist_ok=True)
    with CountBar(total=len(items), title=str(folder), unit="img") as bar:
        writer = ShardWriter(source, folder, settings, _finished_shards(folder, settings))
        for part, shard in zip(tasks.values(), _write_all(writer, tasks, workers), strict=True):
            packed.append(shard)
            bar.update(len(part))
        entries = [shard.entry for shard in packed]
        skipped = [image for entry in entries for image in entry["skipped"]]
        if len(skipped) == len(items):
            raise DataError(f"none of the {len(items)} images of {name} can be used; the first: {skipped[0]}")
        write_bytes(folder / INDEX, SampleTable.concatenate([shard.table for shard in packed]).to_bytes())
        totals = {count: sum(entry[count] for entry in entries) for count in COUNTS}
        write_manifest(
            folder,
            FORMAT,
            entries,
            source=name,
            settings=asdict(settings),
            label_names=list(source.label_names),
            index=file_entry(folder / INDEX),
            **totals,
        )
        for path in folder.glob("shard-*.tar"):
            if path.name not in tasks:  # of an earlier run with more images
                path.unlink()
        shutil.rmtree(folder / _PARTS)
    kept = sum(shard.kept for shard in packed)
    return Report(folder, totals["samples"], len(entries), totals["bytes"], kept, skipped)


def _finished_shards(folder: Path, settings: ShardSettings) -> dict[str, dict[str, Any]]:
    """Return the entries of shards that an earlier run finished, from its manifest and its work files.

    Raises:
        ConfigError: The folder holds a data set with other settings.
        DataError: The manifest is invalid.
    """
    entries: list[dict[str, Any]] = []
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder, FORMAT, COUNTS)
        if manifest.get("settings") != asdict(settings):
            raise ConfigError(
                f"{folder} was packed with {manifest.get('settings')}, not {asdict(settings)}; choose another folder, "
                "or delete it first"
            )
        entries += manifest["shards"]
    for path in (folder / _PARTS).glob("*.json"):
        with suppress(ValueError):  # a damaged file: its shard is packed again
            entry = json.loads(path.read_bytes())
            check_entry(entry, COUNTS)
            entries.append(entry)
    return {entry["name"]: entry for entry in entries}


def _write_all(writer: ShardWriter, tasks: dict[str, list[Item]], workers: int) -> Iterator[PackedShard]:
    """Yield the shards in order."""
    if workers <= 1:
        yield from map(writer.write, tasks, tasks.values())
        return
    with ProcessPoolExecutor(min(workers, len(tasks)), initializer=_start_worker, initargs=(writer,)) as pool:
        yield from pool.map(_write_in_worker, tasks, tasks.values())


_writer: ShardWriter | None = None
"""The writer of this worker process."""


def _start_worker(writer: ShardWriter) -> None:
    global _writer
    end_with_parent()
    _writer = writer


def _write_in_worker(name: str, items: list[Item]) -> PackedShard:
    assert _writer is not None
    return _writer.write(name, items)
