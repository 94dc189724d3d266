"""The samples that a run could not use: told once, counted over all its sessions, and kept as lines of a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from moa_train.order import end_workers
from moa_vision.cache import DataError
from moa_vision.data import BadSampleLimit, ImageBatch
from moa_vision.table import BadSample


class BadSamples:
    """The samples that a run could not use, each once, as lines of a JSON Lines file.

    Args:
        path: The file; what it holds from earlier sessions and from other processes counts.
        limit: How many are put up with.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        self.known = BadSampleLimit(limit)
        self.known.samples.update({(sample.shard, sample.key): sample for sample in self._read()})

    def good(self, batches: Iterable[ImageBatch]) -> Iterator[ImageBatch]:
        """Pass on the batches that hold anything, and note what they lack.

        Unless the batches are read to their end, a loader's workers end with this iteration.

        Raises:
            DataError: beyond the limit, or for a batch with a `failure`.
        """
        ended = False
        try:
            for batch in batches:
                self.note(batch.bad)
                if batch.failure:
                    raise DataError(batch.failure)
                if len(batch.images):
                    yield batch
            ended = True
        except DataError as error:  # a worker's carries its traceback before the message
            raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None
        finally:
            if not ended:
                end_workers(batches)

    def note(self, bad: Sequence[BadSample]) -> None:
        """Record and tell those not seen before. Raises DataError if all processes together have too many."""
        new = self._unknown(bad)
        if not new:
            return
        self.known.samples.update({(sample.shard, sample.key): sample for sample in self._read()})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for sample in self._unknown(new):  # what no other process has told meanwhile
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{self._line_end()}{json.dumps(sample._asdict())}\n")
            tqdm.write(f"warning: skipped {sample.key} in {sample.shard}: {sample.reason}")
        self.known.add(new)

    def _unknown(self, bad: Sequence[BadSample]) -> list[BadSample]:
        found = {(sample.shard, sample.key): sample for sample in bad}
        return [sample for where, sample in found.items() if where not in self.known.samples]

    def recorded(self) -> int:
        """Return how many there are, those of other processes included."""
        return len({(sample.shard, sample.key) for sample in self._read()})

    def _line_end(self) -> str:
        """What ends a last line that was cut short, so that the next one is whole."""
        data = self.path.read_bytes()
        return "\n" if data and not data.endswith(b"\n") else ""

    def _read(self) -> list[BadSample]:
        """The samples of the file; what is no whole line of ours (a killed process may cut one short) is none."""
        if not self.path.exists():
            return []
        samples = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with suppress(ValueError, TypeError, RecursionError):
                sample = BadSample(**json.loads(line))
                if all(isinstance(value, str) for value in sample):
                    samples.append(sample)
        return samples
