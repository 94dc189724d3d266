"""Processes of a run that end together: one that fails or dies ends the others, and the first error is told once.

Process 0 holds a socket to each other process and passes on who failed. A process that dies without a word is known
by its socket, which the kernel closes at once, however the process ended; a machine that is gone is known by the
kernel's keep-alive probes. Nothing is polled, and nobody who is only busy (compiling, reading, asleep) is taken for
dead: a process that hangs is left to the timeout of torch's process group (`moa_train.distributed.PATIENCE`), whose
error ends all of them in this way too. Before `Together.watch`, while processes find each other, it is for the
launcher to end the others.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple, NoReturn

import torch
from accelerate import Accelerator
from torch import distributed

from moa_train.run_folder import again
from moa_train.signals import EXIT_STOPPED

GRACE_S = 5.0
"""Seconds that a process has to end by itself once another has failed, or it has failed itself; then it is ended."""

MACHINE_S = 25
"""Seconds after which a machine that no longer answers is given up."""

WORD_S = 3.0
"""Seconds that an error which may be the consequence of another's waits for word of it, before it is anybody's."""

ENDED_WITHIN_S = MACHINE_S + GRACE_S
"""Seconds within which the failure of one process has ended all; `WORD_S + GRACE_S` unless its machine is gone."""

CONNECT_S = 60.0


class Failure(NamedTuple):
    """The process that failed first, and the exit code with which all end."""

    rank: int
    code: int


class Together:
    """Within the `with` block, after `watch`, the failure of one process ends all; alone, nothing is different.

    An error that leaves the block is shown, in full, on the process that was first to fail. It becomes SystemExit
    there and, silently, on the others.
    """

    def __init__(self) -> None:
        self._link: _Hub | _Spoke | None = None
        self._watched = False
        self._failed = False

    def watch(self, accelerator: Accelerator) -> None:
        """Begin; every process has to call it."""
        self._watched = True
        if accelerator.num_processes == 1:
            return
        rank = accelerator.process_index
        hub = _Hub(accelerator.num_processes) if rank == 0 else None
        where = torch.tensor([hub.port, hub.token] if hub else [0, 0], device=accelerator.device)
        distributed.broadcast(where, src=0)
        port, token = where.tolist()
        address = (os.environ.get("MASTER_ADDR", "localhost"), port)
        try:
            self._link = hub or _Spoke(rank, address, token, speaks=rank == 1 or accelerator.is_local_main_process)
        except OSError as error:
            _say(
                f"warning: process {rank} cannot reach process 0 at {address[0]}, port {port} ({error}). Should it "
                "die, others may wait for it until torch gives up; let the machines reach each other on all ports"
            )

    def fail(self, error: Exception, code: int) -> int:
        """Tell an error whose message is enough, unless another process failed first; return the exit code.

        Before `watch`, a ValueError is about what all processes were given: one of each machine tells it.
        """
        tells = self._tells() or not isinstance(error, ValueError)
        return self._settle(code, lambda: _say(f"error: {message(error)}") if tells else None)

    def stop(self, signal: str) -> NoReturn:
        """End this process at once, and the others with it: `signal` came while there was nothing to save.

        Files are whole or absent however a process ends, so nothing is cleaned up. To be called in any thread.
        """
        _end_soon(EXIT_STOPPED)  # should even telling be impossible
        text = f"stopped     {signal}: training had not begun, and nothing is lost. The same command continues{again()}"
        code = self._settle(EXIT_STOPPED, lambda: print(text, flush=True) if self._tells() else None)
        if isinstance(self._link, _Hub):
            self._link.everyone.wait(GRACE_S)  # to those that have yet to be let in it would look like a death
        os._exit(code)

    def _tells(self) -> bool:
        """Whether what may be true of all processes is this one's to tell."""
        return self._watched or os.environ.get("LOCAL_RANK", "0") == "0"

    def _settle(self, code: int, tell: Callable[[], object]) -> int:
        """Let the others know; `tell` if this is the first failure. Return the exit code of the first."""
        self._failed = True
        first = Failure(-1, code) if self._link is None else self._link.claim(code)
        if self._link is None or first.rank == self._link.rank:
            tell()
        if self._link is not None:
            _end_soon(first.code)
        return first.code

    def __enter__(self) -> Together:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._link is None:
            return
        if kind is not None and error is not None:
            if isinstance(error, RuntimeError):  # torch's, perhaps of a connection that another's end has closed
                self._link.heard.wait(WORD_S)
            raise SystemExit(self._settle(1, lambda: sys.excepthook(kind, error, trace))) from None
        if not self._failed:
            self._link.leave()


def message(error: Exception) -> str:
    """Return an error's message; where torch passes it on from a loader's worker, without the worker's traceback."""
    before, _, trace = str(error).partition("Original Traceback")
    heads = list(re.finditer(rf"^(?:\S*\.)?{type(error).__name__}: ", trace, re.MULTILINE))
    return trace[heads[-1].end() :].rstrip() if before.startswith("Caught ") and heads else str(error)


class _Link:
    """One process's part: who failed first, once that is known."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.first: Failure | None = None
        self.heard = threading.Event()
        self.leaving = False

    def _hear(self, first: Failure) -> None:
        self.first = first
        self.heard.set()
        if first.rank != self.rank and not self.leaving:
            _end_soon(first.code)


class _Hub(_Link):
    """Process 0's part: it listens to all others, settles who was first, and passes that on."""

    def __init__(self, world_size: int) -> None:
        super().__init__(0)
        self.world_size = world_size
        self.token = secrets.randbits(62)  # a stranger that finds the port is not taken for one of us
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=world_size)
        self.port: int = self._server.getsockname()[1]
        self._others: list[socket.socket] = []
        self.everyone = threading.Event()  # is among them
        self._lock = threading.Lock()
        _OURS.add(self._server)
        _in_background(self._accept)

    def claim(self, code: int, rank: int = 0, message: str = "") -> Failure:
        """Settle that `rank` has failed; return who was first. If it is that one, `message` is told, if there is one.

        Told before anybody hears of it: this process may be gone as soon as its other threads do.
        """
        with self._lock:
            if self.first is None:
                if message:
                    _say(message)
                self._hear(Failure(rank, code))
                for other in self._others:
                    _send(other, "failed", rank, code)
            assert self.first is not None
            return self.first

    def leave(self) -> None:
        """Say that this process ends as it should."""
        self.leaving = True
        with self._lock:
            for other in self._others:
                _send(other, "bye")

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                _keep(connection)
                _in_background(self._attend, connection)

    def _attend(self, connection: socket.socket) -> None:
        """Listen to one process until it says that it leaves, or its socket ends; a stranger is shown out."""
        rank, name, gone = 0, "", True
        for words in _lines(connection):
            match words:
                case ["hello", token, number, pid, host] if token == str(self.token):
                    rank, name = int(number), f"process ID {pid} on {host}"
                    self._admit(connection)
                case ["failed", code] if rank:
                    self.claim(int(code), rank)
                case _:  # "bye"
                    gone = False
                    break
        if rank and gone and not self.leaving and self.first is None:
            self.claim(1, rank, _died(rank, self.world_size, name))
        with self._lock:
            _OURS.discard(connection)
            connection.close()

    def _admit(self, connection: socket.socket) -> None:
        with self._lock:
            self._others.append(connection)
            if self.first is not None:
                _send(connection, "failed", *self.first)
            if len(self._others) == self.world_size - 1:
                self.everyone.set()


class _Spoke(_Link):
    """Any other process's part: it tells process 0 if it fails, and hears from it who did.

    Args:
        rank: This process's.
        address: Process 0's.
        token: Process 0's.
        speaks: Whether it is this process that tells if process 0 is gone.

    Raises:
        OSError: process 0 cannot be reached.
    """

    def __init__(self, rank: int, address: tuple[str, int], token: int, *, speaks: bool) -> None:
        super().__init__(rank)
        self._speaks, self._host = speaks, address[0]
        self._world_size = distributed.get_world_size()
        self._connection = socket.create_connection(address, timeout=CONNECT_S)
        self._connection.settimeout(None)
        _keep(self._connection)
        _send(self._connection, "hello", token, rank, os.getpid(), socket.gethostname())
        _in_background(self._attend)

    def claim(self, code: int) -> Failure:
        """Tell process 0 that this one has failed; return who was first, this one if there is no answer."""
        _send(self._connection, "failed", code)
        self.heard.wait(WORD_S)
        return self.first or Failure(self.rank, code)

    def leave(self) -> None:
        """Say that this process ends as it should."""
        self.leaving = True
        _send(self._connection, "bye")

    def _attend(self) -> None:
        for words in _lines(self._connection):
            match words:
                case ["failed", rank, code]:
                    self._hear(Failure(int(rank), int(code)))
                case _:  # "bye": all is done
                    return
        if not self.leaving and self.first is None:
            if self._speaks:  # before this process's other threads hear of it, and perhaps end it
                _say(_died(0, self._world_size, f"on {self._host}"))
            self._hear(Failure(0, 1))


_OURS: set[socket.socket] = set()
"""Sockets of this process. A worker that is forked from it lets go of them: they would outlive it otherwise."""


def _let_go() -> None:
    while _OURS:
        os.close(_OURS.pop().detach())


os.register_at_fork(after_in_child=_let_go)


def _keep(connection: socket.socket) -> None:
    """Keep a new connection, with probes that notice within `MACHINE_S` that the other machine is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": MACHINE_S * 1000}
    for name, value in options.items():
        if hasattr(socket, name):  # not every system has all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    _OURS.add(connection)


def _lines(connection: socket.socket) -> Iterator[list[str]]:
    """Yield the words of each line that comes, until the connection ends, however it does."""
    rest = b""
    with suppress(OSError):
        while data := connection.recv(4096):
            *lines, rest = (rest + data).split(b"\n")
            yield from (line.decode(errors="replace").split() for line in lines)


def _send(connection: socket.socket, *words: object) -> None:
    """Send a line, if there still is someone to hear it."""
    with suppress(OSError):
        connection.sendall(" ".join(map(str, words)).encode() + b"\n")


def _in_background(work: Callable[..., object], *arguments: object) -> None:
    threading.Thread(target=work, args=arguments, daemon=True).start()


def _end_soon(code: int) -> None:
    """End this process after `GRACE_S`, whatever it waits for by then; nothing is written or said."""
    timer = threading.Timer(GRACE_S, os._exit, [code])
    timer.daemon = True
    timer.start()


def _died(rank: int, world_size: int, name: str) -> str:
    return (
        f"error: process {rank} of {world_size} ({name}) ended without a word: it was killed, it crashed (out of "
        "memory?), or its machine is gone. "
        "The others end with it; the same command continues from the last checkpoint"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
