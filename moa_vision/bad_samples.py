"""The unusable samples of a run: each logged once, counted over all sessions and processes, kept as JSON lines.

The limit holds over sessions: a job that is requeued automatically must not skip more samples each time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from moa_train.data_order import end_workers
from moa_train.errors import DataError
from moa_vision.data import ImageBatch
from moa_vision.table import BadSample


class BadSamples:
    """The unusable samples of a run, each once, in a JSON Lines file; after `limit` of them the run stops."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit = path, limit
        self.known: dict[tuple[str, str], BadSample] = {}
        self._read()

    def good(self, batches: Iterable[ImageBatch]) -> Iterator[ImageBatch]:
        """Yield the non-empty batches and note their bad samples; end the loader's workers if stopped early.

        Raises:
            DataError: There are too many bad samples, including those of earlier sessions.
        """
        self.note(())
        ended = False
        try:
            for batch in batches:
                self.note(batch.bad)
                if len(batch.images):
                    yield batch
            ended = True
        finally:
            if not ended:
                end_workers(batches)

    def note(self, bad: Sequence[BadSample]) -> None:
        """Record and log samples not seen before.

        Raises:
            DataError: The run has more bad samples than the limit.
        """
        if any(sample[:2] not in self.known for sample in bad):
            self._read()  # other processes may have recorded them
            for sample in bad:
                if sample[:2] not in self.known:
                    self.known[sample[:2]] = sample
                    self._write(sample)
                    tqdm.write(f"warning: skipped {sample.key} in {sample.shard}: {sample.reason}")
        if len(self.known) > self.limit:
            shard, key, reason = list(self.known.values())[-1]
            raise DataError(
                f"{len(self.known)} bad samples, more than data.max_bad_samples = {self.limit} allows; the last is "
                f"{key} in {shard}: {reason}. Repair the shards and delete {self.path}, which lists all of them, or "
                "raise the limit; then run the command again."
            )

    def recorded(self) -> int:
        """Return the number of bad samples of all processes and sessions."""
        self._read()
        return len(self.known)

    def _write(self, sample: BadSample) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(sample._asdict()) + "\n")

    def _read(self) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        for line in lines:
            with suppress(ValueError):  # cut short by kill -9
                sample = BadSample(**json.loads(line))
                self.known[sample[:2]] = sample
