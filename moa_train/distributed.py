"""How one model is spread over the processes of a run: whole on each of them (DDP), or in shards (FSDP2).

Both take the same steps as one process does, and leave the same checkpoints. accelerate starts the processes and
finds the devices; FSDP2 is torch's own `fully_shard`, on every kind of device, where accelerate's configuration asks
for it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, patch_environment
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate

from moa_train.config import LoopConfig

WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers (torchrun, accelerate, MPI) leave the number of processes that they start; the first one counts."""

SLURM_TASKS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
"""Where Slurm leaves the number of tasks of a step and of a job. A task may be a launcher: others come first."""

PATIENCE = timedelta(hours=4)
"""How long a process waits for the others. torch's 10 minutes with NCCL would end runs in which nothing is wrong: at
the first start on remote shards without a manifest one process of each machine fetches all of them (140 GB take two
hours at 20 MB/s), and a large checkpoint may go to a slow disk. Dead processes are noticed without it
(`moa_train.failures`); only one that hangs, or never came, is waited for so long."""

UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "use fsdp2.yaml, or gpus_8.yaml",
    "ACCELERATE_USE_MEGATRON_LM": "use fsdp2.yaml, or gpus_8.yaml",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "leave parallelism_config out",
    "FSDP_OFFLOAD_PARAMS": "leave fsdp_offload_params out",
    "FSDP_ACTIVATION_CHECKPOINTING": "use --model.gradient_checkpointing true instead",
}
"""What accelerate's configuration can ask for and no run does, by the variable that its launcher sets: the remedy."""

OURS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "1",
        "set schedule.batch_size and loop.micro_batch_size instead, and the run accumulates what they leave",
    ),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "use --loop.compile true instead"),
}
"""What accelerate would do beside what the run's configuration says, by variable: the value without; the remedy."""


def start(config: LoopConfig, trackers: Path) -> Accelerator:
    """Return the Accelerator of this process, which knows its device and the other processes.

    Where several processes were launched on a machine without accelerators, they run on its CPUs. `trackers` is the
    folder of the trackers.

    Raises:
        ValueError: there are other processes than were asked for, by the launcher or by `loop.world_size`, or the
            launcher's configuration asks for something that no run does, or that is the run's to say.
    """
    for variable, remedy in UNSUPPORTED.items():
        if _flag(variable):
            raise ValueError(f"accelerate's configuration sets {variable}; there is no such run: {remedy}")
    for variable, (without, remedy) in OURS.items():
        value = os.environ.get(variable, without)
        if value.lower() != without:
            raise ValueError(f"{variable} is {value}; it must be {without} or unset: {remedy}")
    shards_wanted()
    # accelerate would go on as unrelated single processes.
    on_cpus = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    with patch_environment(ACCELERATE_USE_FSDP="false"):  # its own wrapping does other things, and on GPUs only
        accelerator = Accelerator(
            cpu=on_cpus,
            mixed_precision="bf16" if config.precision == "bf16" else "no",
            log_with=list(config.trackers) or None,
            project_dir=trackers,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    _check_world_size(accelerator.num_processes, config.world_size)
    return accelerator


def shards_wanted() -> bool:
    """Whether accelerate's configuration asks for FSDP2. Raises ValueError if it asks for FSDP1."""
    if not _flag("ACCELERATE_USE_FSDP"):
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(f"fsdp_version is {version} in accelerate's configuration; it must be 2, as in fsdp2.yaml")
    return True


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1", "yes")


def _check_world_size(found: int, processes: int | None) -> None:
    for source, asked in _asked(processes):
        if asked != found:
            raise ValueError(
                f"{source} asks for {asked} processes, but there {'is' if found == 1 else 'are'} {found}; "
                "launch it with accelerate and a file of configs/accelerate, or with torchrun (on CPUs that have "
                "accelerators beside them: with ACCELERATE_USE_CPU=true)"
                + (", or change loop.world_size" if source == "loop.world_size" else "")
                + (f", or say --loop.world_size {found} if that is what you want" if source in SLURM_TASKS else "")
            )
    # A launcher that starts several processes by MPI only (accelerate's MULTI_CPU) sets the address, and starts one.
    launched = "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and processes is None and not _first_of(WORLD_SIZES):
        raise ValueError(
            "accelerate was asked for several processes (MASTER_ADDR is set), but started one, as it does for "
            "MULTI_CPU without MPI; launch it with configs/accelerate/cpu_2.yaml, or set loop.world_size to 1 if one "
            "is what you want"
        )


def _asked(processes: int | None) -> Iterator[tuple[str, int]]:
    """Yield who asked for how many processes."""
    launcher = _first_of(WORLD_SIZES)
    if processes is not None:
        yield "loop.world_size", processes
    elif launcher is None:
        launcher = _first_of(SLURM_TASKS)
    if launcher is not None:
        yield launcher, int(os.environ[launcher])


def _first_of(variables: Iterable[str]) -> str | None:
    return next((name for name in variables if os.environ.get(name)), None)


class DistributedModel:
    """A model spread over all processes, each of which holds it whole (DDP) or a shard of each parameter (FSDP2).

    In shards, autocast's bf16 copies of the weights live from forward to backward, whole: 2 bytes a parameter beside
    the shards of weights, gradients and moments.

    Args:
        bare: The module, whole and on its device; it is changed in place. The main process's weights become
            everyone's.
        accelerator: Of `start`.
        compiled: Compile it: as a whole, or in shards its blocks, see `blocks`.

    Attributes:
        bare: The module itself, whose parameters the optimizer steps: DTensors where `sharded`.
        model: What is called to train it.
        sharded: Whether it is in shards.
    """

    def __init__(self, bare: nn.Module, accelerator: Accelerator, *, compiled: bool) -> None:
        self.bare, self._accelerator = bare, accelerator
        self.sharded = shards_wanted() and accelerator.num_processes > 1
        self._hollow = _hollow(bare) if self.sharded and accelerator.is_main_process else None
        if self.sharded:
            self._shard(compiled)
        elif compiled:
            bare.compile()  # in place: the names in the state dict stay
        self.model: nn.Module = accelerator.prepare_model(bare, evaluation_mode=self.sharded)  # True: without DDP

    def _shard(self, compiled: bool) -> None:
        for tensor in (*self.bare.parameters(), *self.bare.buffers()):
            dist.broadcast(tensor.detach(), src=0)
        mesh = init_device_mesh(self._accelerator.device.type, (self._accelerator.num_processes,))
        again = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
        parts = blocks(self.bare)
        if compiled:
            for part in parts or [self.bare]:
                part.forward = torch.compile(part.forward)  # not __call__: the hooks that gather weights stay outside
        for part in parts:
            fully_shard(part, mesh=mesh, reshard_after_forward=again)
        fully_shard(self.bare, mesh=mesh)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it, a backward pass adds to gradients without exchanging them: for all but a step's last one."""
        if not isinstance(self.bare, FSDPModule):
            with self._accelerator.no_sync(self.model):
                yield
            return
        self.bare.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.bare.set_requires_gradient_sync(True)

    def rest(self) -> None:
        """Bring the parameters back into shards after a forward pass that no backward pass follows."""
        if isinstance(self.bare, FSDPModule):
            self.bare.reshard()  # torch leaves the root's, and only these, whole

    @contextmanager
    def whole(self) -> Iterator[nn.Module | None]:
        """Give the main process a plain module with all weights, in the mode of `bare`, and the others None.

        To be entered by all processes together. Without shards it is `bare` itself; else a module of the same class
        on the same device, which is good within the context only.
        """
        if not self.sharded:
            yield self.bare if self._accelerator.is_main_process else None
            return
        self.rest()
        weights = []
        for parameter in self.bare.parameters():
            weight = full(parameter.detach())
            if self._hollow is not None:  # the others hold one at a time
                weights.append(weight)
        if self._hollow is None:
            yield None
            return
        hollow = self._hollow.train(self.bare.training)
        for own, current in zip(hollow.buffers(), self.bare.buffers(), strict=True):
            own.copy_(current)
        empty = list(hollow.parameters())
        filled = [nn.Parameter(w, old.requires_grad) for w, old in zip(weights, empty, strict=True)]
        _replace(hollow, dict(zip(empty, filled, strict=True)))
        try:
            yield hollow
        finally:
            _replace(hollow, dict(zip(filled, empty, strict=True)))


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules that a model consists of many of, in order: those that are gathered one at a time.

    They are the items of every nn.ModuleList and nn.Sequential that lies in no other and whose items, with parameters
    all, are of one class.
    """
    found: list[nn.Module] = []
    for child in model.children():
        items = list(child.children()) if isinstance(child, nn.ModuleList | nn.Sequential) else []
        alike = len({type(item) for item in items}) == 1 and all(any(True for _ in i.parameters()) for i in items)
        found += items if alike else blocks(child)
    return found


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor in shards, which all processes ask for together; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def place_like(parameter: Tensor, whole: Tensor) -> Tensor:
    """Return `whole`, which every process has, in shards on the device of `parameter` if it is in shards.

    The undoing of `full`; nothing is exchanged. A tensor of another shape than the parameter's, such as a step count,
    and every tensor for a parameter that is not in shards, is returned as it is.
    """
    if not isinstance(parameter, DTensor) or whole.shape != parameter.shape:
        return whole
    mesh = parameter.device_mesh
    everywhere = DTensor.from_local(whole.to(parameter.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=parameter.placements)


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Return the 2-norm () of all gradients together: torch.nn.utils.get_total_norm of the whole ones.

    Of gradients in shards, which all processes ask for together, each adds up its own part.
    """
    gradients = list(gradients)
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    norm = torch.nn.utils.get_total_norm([local(gradient) for gradient in gradients])
    square = norm.double().square()
    dist.all_reduce(square)
    return square.sqrt().to(norm.dtype)


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard, sharing its memory; a tensor that is not in shards as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _hollow(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose parameters have shapes but no memory."""
    empty: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, empty)


def _replace(model: nn.Module, parameters: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Put other parameters in the place of a model's; tied ones stay tied."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, name, parameters[parameter])
