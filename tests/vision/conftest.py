"""Photographs, tars written by tarfile, an HTTP server with faults, and a cache folder for each test."""

from __future__ import annotations

import http.server
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import skimage.data
from PIL import Image

from moa_vision import cache
from moa_vision.shards import ShardSettings, make_shards


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A default cache folder that is removed with the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))
    return tmp_path / "cache-home"


@pytest.fixture
def small_run(tmp_path: Path) -> Callable[..., list[str]]:
    """small_run(**changed) -> command line of a run of a small MAE in tmp_path/runs; `a__b` sets key a.b."""

    def small_run(**changed) -> list[str]:
        encoder = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4}
        values = {
            "name": "run",
            "out": tmp_path / "runs",
            "model.encoder": "vit_tiny_patch16_qdmoa",
            "model.img_size": [16, 24],
            "model.encoder_args": json.dumps(encoder | changed.pop("encoder_args", {})),
            "model.decoder_dim": 16,
            "model.decoder_depth": 1,
            "model.decoder_heads": 2,
            "data.workers": 0,
            "schedule.epochs": 2,
            "schedule.warmup_epochs": 0,
            "schedule.batch_size": 8,
            "loop.micro_batch_size": 4,
            "loop.log_every": 1,
            "loop.trackers": "[]",
        } | {key.replace("__", "."): value for key, value in changed.items()}
        return [f"--{key}={value}" for key, value in values.items()]

    return small_run


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """Four photographs of different shapes, short side about 128."""
    arrays = [getattr(skimage.data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket")]
    images = [Image.fromarray(array) for array in arrays]
    for image, side in zip(images, (128, 120, 140, 101), strict=True):
        image.thumbnail((10_000, side), Image.Resampling.BICUBIC)
    return images


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """encode(image, format="JPEG", **options) -> bytes, by PIL."""

    def encode(image: Image.Image, format: str = "JPEG", **options) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def write_tar() -> Callable[..., Path]:
    """write_tar(path, [(member name, bytes), ...]) -> path, by tarfile."""

    def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write_tar


@pytest.fixture
def shards(tmp_path: Path, photos, encode, write_tar) -> Path:
    """A folder of 5 tars with 9, 4, 7, 1 and 11 labelled JPEG photographs; keys a0, a1, ..., e10."""
    folder = tmp_path / "shards"
    number = 0
    for letter, count in zip("abcde", (9, 4, 7, 1, 11), strict=True):
        members = []
        for i in range(count):
            photo = photos[number % len(photos)].rotate(number, Image.Resampling.BILINEAR)
            members += [(f"{letter}{i}.jpg", encode(photo)), (f"{letter}{i}.cls", str(number).encode())]
            number += 1
        write_tar(folder / f"{letter}.tar", members)
    return folder


@pytest.fixture
def packed(shards: Path, tmp_path: Path) -> Path:
    """A packed data set of the photographs in `shards`: 4 shards of 8."""
    make_shards(str(shards), tmp_path / "packed", ShardSettings(samples_per_shard=8))
    return tmp_path / "packed"


class Server(http.server.ThreadingHTTPServer):
    """A server of a folder; `faults` maps a file name to the faults of its next requests.

    A fault is a status, "cut" (half of the file), "silent cut" (without a length header), "stall", or "garbled".
    """

    def __init__(self, folder: Path, mixin: type | None = None) -> None:
        self.faults: dict[str, list[int | str]] = {}
        self.requests: list[str] = []
        self.stalled = threading.Event()
        handler = type("Handler", (mixin, Handler) if mixin else (Handler,), {})
        super().__init__(("127.0.0.1", 0), partial(handler, directory=str(folder)))
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def close(self) -> None:
        self.stalled.set()
        self.shutdown()
        self.server_close()


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.server.requests.append(name)
        fault = self.server.faults.get(name, [])
        if not fault:
            return super().do_GET()
        kind = fault.pop(0)
        if isinstance(kind, int):
            return self.send_error(kind)
        self.close_connection = True
        if kind == "garbled":
            self.wfile.write(b"HTTP/x.y zzz\r\n\r\n")
            return None
        data = (Path(self.directory) / name).read_bytes()
        self.send_response(200)
        if kind != "silent cut":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        if kind == "stall":
            self.server.stalled.wait(120)
        return None

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """serve(folder, mixin of its handler) -> a running `Server`; pauses between attempts are short."""
    monkeypatch.setattr(cache, "BACKOFF_S", 0.002)
    servers: list[Server] = []

    def serve(folder: Path, mixin: type | None = None) -> Server:
        servers.append(Server(folder, mixin))
        return servers[-1]

    yield serve
    for server in servers:
        server.close()
