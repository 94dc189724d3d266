"""The samples that a run could not use: told once, counted over all its sessions, and kept as lines of a file.

Beyond the limit no session goes on: a command that is queued again would otherwise put up with more each time.
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
    """The samples that a run could not use, each once, as lines of a JSON Lines file.

    Args:
        path: The file; what it holds from earlier sessions and from other processes counts.
        limit: How many are put up with.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit = path, limit
        self.known: dict[tuple[str, str], BadSample] = {}
        self._know(self._read())

    def good(self, batches: Iterable[ImageBatch]) -> Iterator[ImageBatch]:
        """Pass on the batches that hold anything, and note what they lack.

        Unless the batches are read to their end, a loader's workers end with this iteration.

        Raises:
            DataError: beyond the limit, for earlier sessions' samples before the first batch; or for a batch with a
                `failure`.
        """
        self.note(())
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
        """Record and tell those not seen before; where the file cannot be written, they count in this process.

        Raises:
            DataError: all processes and sessions together have too many, be there new ones among these or not.
        """
        if self._unknown(bad):
            self._know(self._read())
            new = self._unknown(bad)  # what no other process has told meanwhile
            for sample in new:
                self._write(sample)
                tqdm.write(f"warning: skipped {sample.key} in {sample.shard}: {sample.reason}")
            self._know(new)
        if len(self.known) > self.limit:
            shard, key, reason = list(self.known.values())[-1]
            raise DataError(
                f"{len(self.known)} bad samples, more than data.max_bad_samples = {self.limit} allows. The last: "
                f"{key} in {shard}: {reason}. Make or fetch these shards again and delete {self.path}, which lists "
                "all of them; or raise the limit. Then run the same command again."
            )

    def _write(self, sample: BadSample) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{self._line_end()}{json.dumps(sample._asdict())}\n")
        except OSError as error:  # a full disk ends no run
            tqdm.write(
                f"warning: {self.path} could not be written ({error}): a later session does not count this sample; "
                "free space there"
            )

    def _know(self, samples: Iterable[BadSample]) -> None:
        self.known.update({(sample.shard, sample.key): sample for sample in samples})

    def _unknown(self, bad: Sequence[BadSample]) -> list[BadSample]:
        found = {(sample.shard, sample.key): sample for sample in bad}
        return [sample for where, sample in found.items() if where not in self.known]

    def recorded(self) -> int:
        """Return how many there are, those of other processes included."""
        self._know(self._read())
        return len(self.known)

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
