"""Benchmarks: every figure is a median over alternating rounds of one run, with its 20th and 80th percentile.

Ratios are taken round by round, so that a machine whose speed drifts does not decide them.
"""

import argparse
import collections
import csv
import gc
import io
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import evaluation_speed
import torch
from PIL import Image
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset

from moa_ffn import FFN, VARIANTS, FFNSpec

if TYPE_CHECKING:
    from moa_vision.data import DataConfig
    from moa_vision.index import ShardReader

Step = Callable[[], object]
MIB = 2**20


@dataclass
class Row:
    """One line of a result table: seconds of every round, and what else is known."""

    labels: dict[str, str]
    seconds: list[float]
    items: int
    peak_mib: float | None = None


def percentile(values: list[float], percent: int) -> float:
    """Inclusive percentile; a single value is its own."""
    return values[0] if len(values) == 1 else statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(steps: list[Step], device: torch.device, rounds: int, warmup: int = 1) -> list[list[float]]:
    """Seconds of each step in each round, the steps taking turns."""
    seconds: list[list[float]] = [[] for _ in steps]
    for round_index in range(warmup + rounds):
        for step, times in zip(steps, seconds, strict=True):
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if round_index >= warmup:
                times.append(time.perf_counter() - start)
    return seconds


def peak_memory_mib(step: Step, device: torch.device) -> float:
    """Largest tensor memory that the step holds beyond what was held before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results: Any = profiler.profiler.kineto_results if profiler.profiler else None
    held = peak = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / MIB


def report(
    title: str,
    rows: list[Row],
    baseline: int | list[int],
    unit: str,
    out: Path,
    note: str = "",
    *,
    ratio: str = "speed ratio",
) -> None:
    """Print a Markdown table and write it as CSV. `baseline` is the row (or a row for each row) that ratios refer to;
    `ratio` is "speed ratio" (above 1: faster) or "time ratio" (above 1: slower).
    """
    references = [baseline] * len(rows) if isinstance(baseline, int) else baseline
    names = list(rows[0].labels)
    head = [*names, "median s", "p20", "p80", f"{unit}/s", ratio, "p20-p80"]
    head += ["peak MiB", "memory ratio"] if rows[0].peak_mib is not None else []
    lines = []
    for row, reference in zip(rows, (rows[i] for i in references), strict=True):
        ratios = [own / other for own, other in zip(row.seconds, reference.seconds, strict=True)]
        ratios = [1 / value for value in ratios] if ratio == "speed ratio" else ratios
        median = statistics.median(row.seconds)
        line = [row.labels[name] for name in names]
        line += [f"{value:.4g}" for value in (median, percentile(row.seconds, 20), percentile(row.seconds, 80))]
        line += [f"{row.items / median:,.4g}", f"{statistics.median(ratios):.3f}"]
        line += [f"{percentile(ratios, 20):.3f}-{percentile(ratios, 80):.3f}"]
        if row.peak_mib is not None and reference.peak_mib:
            line += [f"{row.peak_mib:,.1f}", f"{row.peak_mib / reference.peak_mib:.3f}"]
        lines.append(line)
    print(f"\n### {title}\n\n{environment()}. {note}\n")
    for line in (head, ["---"] * len(head), *lines):
        print(f"| {' | '.join(line)} |")
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{title.split(':')[0].strip().lower()}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *lines])


def environment() -> str:
    """Device and versions, for the line above each table."""
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{cpu_name()}, {torch.get_num_threads()} threads"
    )
    return f"{device}; Python {platform.python_version()}, torch {torch.__version__}"


def cpu_name() -> str:
    """The processor's model name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


# --- ffn: each variant against its fixed counterpart ---------------------------------------------------------


def ffn_step(layer: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], x: Tensor, backward: bool) -> None:
    """Forward, and with `backward` the gradients of the input and of every weight."""
    if not backward:
        with torch.no_grad():
            layer(x)
        return
    out = layer(x)
    torch.autograd.grad(out, [x, *parameters], torch.ones_like(out))


def benchmark_ffn(args: argparse.Namespace) -> None:
    """Time and peak memory of every variant, eager and compiled, against the fixed FFN of its type."""
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(args.tokens, args.dim, device=device, dtype=dtype, requires_grad=True)
    torch._dynamo.config.recompile_limit = 4 * len(VARIANTS)  # one forward function serves all variants
    for backward, compiled in product((False, True), (False, True)):
        torch._dynamo.reset()
        rows, steps = [], []
        for variant in VARIANTS:
            hidden = args.dim * 8 // 3 if FFNSpec(variant).type_two else args.dim * 4
            ffn = FFN(args.dim, hidden, variant, device=device, dtype=dtype)
            call = torch.compile(ffn) if compiled else ffn
            steps.append(partial(ffn_step, call, list(ffn.parameters()), x, backward))
            rows.append(Row({"variant": variant, "hidden": str(hidden)}, [], args.tokens))
        for row, seconds in zip(rows, alternate(steps, device, args.rounds, warmup=3), strict=True):
            row.seconds = seconds
        for row, step in zip(rows, steps, strict=True):
            row.peak_mib = peak_memory_mib(step, device)
        fixed = [VARIANTS.index("swiglu" if FFNSpec(v).type_two else "gelu") for v in VARIANTS]
        mode = f"{'forward and backward' if backward else 'forward'}, {'compiled' if compiled else 'eager'}"
        title = f"ffn-{'train' if backward else 'infer'}-{'compiled' if compiled else 'eager'}: {mode}"
        note = (
            f"{args.tokens} tokens, width {args.dim}, {str(dtype)[6:]}; Type-I against gelu, Type-II against swiglu"
        )
        report(title, rows, fixed, "tokens", args.out, note, ratio="time ratio")


# --- mae: a full training step against transformers' ViTMAE --------------------------------------------------


def train_step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, autocast: torch.autocast) -> None:
    """Forward, backward, fused AdamW."""
    with autocast:
        value = loss()
    value.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def mae_peers(device: torch.device) -> Iterator[tuple[str, nn.Module]]:
    """Ours with the GELU FFN, and transformers' ViTMAE of the same size (ViT-Base/16 at 224 px by default)."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    from moa_vision.mae import create_mae

    theirs: nn.Module = ViTMAEForPreTraining(ViTMAEConfig(norm_pix_loss=True))
    yield "transformers.ViTMAEForPreTraining", nn.Module.to(theirs, device)
    yield "moa_vision, gelu", create_mae("vit_base_patch16_gelu", img_size=224, encoder_args={}).to(device)


def benchmark_mae(args: argparse.Namespace) -> None:
    """Images/s of a training step of MAE ViT-B/16, mask ratio 0.75, both with the same fused AdamW."""
    device = torch.device(args.device)
    images = torch.randn(args.batch, 3, 224, 224, device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    rows, steps = [], []
    for (name, model), compiled in product(mae_peers(device), (False, True) if args.compile else (False,)):
        call = torch.compile(model) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
        steps.append(partial(train_step, lambda call=call: call(images).loss, optimizer, autocast))
        rows.append(Row({"model": name, "mode": "compiled" if compiled else "eager"}, [], args.batch))
    for row, seconds in zip(rows, alternate(steps, device, args.rounds), strict=True):
        row.seconds = seconds
    for row, step in zip(rows, steps, strict=True):
        row.peak_mib = peak_memory_mib(step, device)
    modes = len(rows) // 2
    precision = "bfloat16 autocast" if autocast._enabled else "float32"
    note = f"batch {args.batch}, {precision}, fused AdamW"
    report("mae: full training step, ViT-B/16", rows, [i % modes for i in range(len(rows))], "images", args.out, note)


# --- loader: one core, from shards to batches, against the official recipe -------------------------------


class OfficialRecipe(Dataset[Tensor]):
    """Images of facebookresearch/mae: PIL, RandomResizedCrop bicubic, flip, ToTensor, Normalize."""

    def __init__(self, reader: "ShardReader", config: "DataConfig", size: int) -> None:
        from torchvision import transforms

        self.reader = reader
        bicubic = transforms.InterpolationMode.BICUBIC
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=config.crop_scale, interpolation=bicubic),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(config.mean, config.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.reader.index)

    def __getitem__(self, sample: int) -> Any:
        image = Image.open(io.BytesIO(self.reader.read(sample).tobytes())).convert("RGB")
        return self.transform(image)


def photographs_of_short_side_256(folder: Path) -> str:
    """Shards of scikit-image's photographs, where no others are given."""
    from moa_vision.photographs import TRAIN, VAL, photograph_folder
    from moa_vision.shards import ShardSettings, make_shards

    (folder / "in").mkdir()
    for copy, name in product(range(8), TRAIN + VAL):  # so that they fill a batch
        shutil.copy(photograph_folder() / name, folder / "in" / f"{copy}-{name}")
    make_shards(str(folder / "in"), folder / "out", ShardSettings(short_side=256, quality=90))
    return str(folder / "out")


def benchmark_loader(args: argparse.Namespace) -> None:
    """Images/s of one core, in one process with one thread, at 224 pixels; ours also with four crops an image."""
    from moa_vision.data import DataConfig, train_loader
    from moa_vision.index import ShardReader, open_index

    size, batch, batches = 224, 64, 8
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        shards = args.shards or photographs_of_short_side_256(Path(folder))
        index = open_index(shards, folder)
        official = OfficialRecipe(ShardReader(index), DataConfig(train=shards), size)
        generator = torch.Generator().manual_seed(0)
        samples = torch.randint(len(index), (batches * batch,), generator=generator).tolist()

        def recipe() -> None:
            collections.deque(DataLoader(official, batch, sampler=samples), maxlen=0)

        def ours(repeats: int) -> None:
            config = DataConfig(train=shards, workers=0, repeats=repeats)
            step = {"global_batch": batch, "micro_batch": batch, "num_steps": batches}
            loader = train_loader(index, config, image_size=(size, size), num_patches=196, seed=0, **step)
            collections.deque(loader, maxlen=0)

        names = ["PIL, RandomResizedCrop, ToTensor, Normalize", "moa_vision", "moa_vision, repeats=4 (crops)"]
        steps = [recipe, partial(ours, 1), partial(ours, 4)]
        seconds = alternate(steps, torch.device("cpu"), args.rounds)
        rows = [Row({"loader": name}, times, batches * batch) for name, times in zip(names, seconds, strict=True)]
        report("loader: one core", rows, 0, "images", args.out, f"{batch} images a batch, {size} pixels, one thread")
    torch.set_num_threads(threads)


# --- startup: what the installed hook adds to a start of Python ------------------------------------------------

HOOK_LINE = """
import sys, time, moa_startup
for _ in range({repeats}):
    sys.modules.pop("moa_startup")
    sys.meta_path = [finder for finder in sys.meta_path if finder.__module__ != "moa_startup"]
    start = time.perf_counter()
    exec({line!r})
    print(time.perf_counter() - start)
"""


def benchmark_startup(args: argparse.Namespace) -> None:
    """Seconds of the line in moa_startup.pth, module import included, and of whole starts with it and without."""
    line = (Path(__file__).parent.parent / "moa_startup" / "moa_startup.pth").read_text()

    def python(code: str, hook: bool) -> str:
        environment = {"MOA_STARTUP": str(int(hook)), "PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, check=True
        ).stdout

    with TemporaryDirectory() as folder:
        steps: list[Step] = [partial(python, "pass", False), partial(python, "pass", True)]
        off, on = alternate(steps, torch.device("cpu"), 10 * args.rounds, warmup=3)
        line_s = [
            float(value) for value in python(HOOK_LINE.format(repeats=10 * args.rounds, line=line), True).split()
        ]
    rows = [Row({"what": f"python -c pass, MOA_STARTUP={i}"}, times, 1) for i, times in enumerate((off, on))]
    rows.append(Row({"what": "the line alone"}, line_s, 1))
    report("startup: the hook", rows, 0, "starts", args.out, ratio="time ratio")


def main() -> None:
    """Parse and run."""
    if sys.argv[1:2] == ["eval"]:
        evaluation_speed.main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "what", choices=[*BENCHMARKS, "eval", "all"], help="which benchmark; `eval --help` has options of its own"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds after the warm-up")
    parser.add_argument("--out", type=Path, default=Path("reports/benchmarks"), help="folder of the CSV files")
    parser.add_argument("--tokens", type=int, default=1600, help="ffn: tokens; 1600 = 32 images x 50 visible patches")
    parser.add_argument("--dim", type=int, default=768, help="ffn: model width")
    parser.add_argument("--batch", type=int, default=32, help="mae: images a step")
    parser.add_argument("--compile", action="store_true", help="mae: both models compiled as well")
    parser.add_argument("--shards", help="loader: shards (default: scikit-image's photographs, short side 256)")
    args = parser.parse_args()
    for name in BENCHMARKS if args.what == "all" else [args.what]:
        BENCHMARKS[name](args)
    if args.what == "all":
        evaluation_speed.main([])


BENCHMARKS = {
    "ffn": benchmark_ffn,
    "mae": benchmark_mae,
    "loader": benchmark_loader,
    "startup": benchmark_startup,
}

if __name__ == "__main__":
    main()
