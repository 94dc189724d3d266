"""Data-parallel training with DDP (the model whole on each rank) or FSDP2 (its parameters in shards).

Both take the steps of a single process and write the same checkpoints. accelerate starts the processes and finds the
devices. FSDP2 is torch's `fully_shard`, used on every kind of device when accelerate's configuration asks for it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, patch_environment
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from moa_train.config import LoopConfig
from moa_train.errors import ConfigError, ReportedError

Result = TypeVar("Result")

TIMEOUT = timedelta(hours=4)
"""Timeout of collectives. The first start on remote shards without a manifest fetches all of them on one rank of each
machine, while the other ranks wait; torch's default of 10 minutes with NCCL would end such runs."""

ACCELERATE_SETTINGS = {
    "ACCELERATE_USE_DEEPSPEED": ("false", "use fsdp2.yaml or gpus_8.yaml"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "use fsdp2.yaml or gpus_8.yaml"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", "remove parallelism_config"),
    "FSDP_OFFLOAD_PARAMS": ("false", "remove fsdp_offload_params"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "use --model.gradient_checkpointing true"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "use schedule.batch_size and loop.micro_batch_size"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "use --loop.compile true"),
}
"""Accelerate environment variables that conflict with the run config, with the required value and the fix."""


def start(config: LoopConfig, trackers: Path) -> Accelerator:
    """Return this process's Accelerator, which knows its device and the other ranks.

    Processes that are launched on a machine without accelerators run on its CPUs. `trackers` is the folder of trackers'
    files.

    Raises:
        ConfigError: The world size differs from `loop.world_size`, or accelerate's configuration contains a setting
            that runs do not support.
    """
    for variable, (required, fix) in ACCELERATE_SETTINGS.items():
        value = os.environ.get(variable, required)
        if value.lower() != required:
            raise ConfigError(f"accelerate's configuration sets {variable} to {value!r}, which is not supported; {fix}")
    fsdp_requested()
    # Without this, accelerate would start unrelated single processes.
    on_cpus = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    with patch_environment(ACCELERATE_USE_FSDP="false"):  # accelerate's own FSDP runs on GPUs only
        accelerator = Accelerator(
            cpu=on_cpus,
            mixed_precision="bf16" if config.precision == "bf16" else "no",
            log_with=list(config.trackers) or None,
            project_dir=trackers,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
        )
    if config.world_size not in (None, accelerator.num_processes):
        raise ConfigError(
            f"loop.world_size is {config.world_size}, but the world size is {accelerator.num_processes}; launch with a "
            "file of configs/accelerate, with torchrun or with scripts/cluster, or change it"
        )
    return accelerator


def fsdp_requested() -> bool:
    """Return whether accelerate's configuration asks for FSDP2. Raises ConfigError if it asks for FSDP1."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in ("true", "1"):
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(f"fsdp_version is {version} in accelerate's configuration; it must be 2, as in fsdp2.yaml")
    return True


class DistributedModel:
    """A model on all ranks, each of which holds it whole (DDP) or a shard of each parameter (FSDP2).

    With bf16 autocast, FSDP2 keeps the bf16 copies of the weights whole from forward to backward: 2 bytes a parameter.

    Args:
        bare: The module, whole and on its device; it is changed in place. All ranks get the main process's weights.
        accelerator: From `start`.
        compiled: Compile the whole model, or with FSDP2 its blocks.

    Attributes:
        bare: The module, whose parameters the optimizer steps; DTensors if `sharded`.
        model: The module to call in training.
        sharded: Whether the parameters are in shards.
    """

    def __init__(self, bare: nn.Module, accelerator: Accelerator, *, compiled: bool) -> None:
        self.bare, self._accelerator = bare, accelerator
        self.sharded = fsdp_requested() and accelerator.num_processes > 1
        if self.sharded:
            self._whole = _cpu_copy(bare) if accelerator.is_main_process else None
            self._shard(compiled)
        elif compiled:
            bare.compile()  # in place: the names in the state dict stay
        self.model: nn.Module = accelerator.prepare_model(bare, evaluation_mode=self.sharded)  # True: without DDP

    def _shard(self, compiled: bool) -> None:
        for tensor in (*self.bare.parameters(), *self.bare.buffers()):
            dist.broadcast(tensor.detach(), src=0)
        mesh = init_device_mesh(self._accelerator.device.type, (self._accelerator.num_processes,))
        reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
        parts = blocks(self.bare)
        if compiled:
            for part in parts or [self.bare]:
                part.forward = torch.compile(part.forward)  # not __call__: its hooks gather the weights
        for part in parts:
            fully_shard(part, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(self.bare, mesh=mesh)

    def set_gradient_sync(self, enabled: bool) -> None:
        """Reduce gradients over ranks in the following backward passes, or only accumulate them."""
        if isinstance(self.bare, FSDPModule):
            self.bare.set_requires_gradient_sync(enabled)
        elif isinstance(self.model, DistributedDataParallel):
            self.model.require_backward_grad_sync = enabled

    def reshard(self) -> None:
        """Free the whole parameters that a forward pass without a backward pass leaves in the root module."""
        if isinstance(self.bare, FSDPModule):
            self.bare.reshard()

    @contextmanager
    def whole(self) -> Iterator[nn.Module | None]:
        """Give the main process a plain module with all weights, and the other ranks None.

        All ranks enter it together. With FSDP2 the module is a copy that is valid within the context only.
        """
        if not self.sharded:
            yield self.bare if self._accelerator.is_main_process else None
            return
        weights = get_model_state_dict(self.bare, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if self._whole is None:
            yield None
            return
        self._whole.load_state_dict(weights)
        yield self._whole.train(self.bare.training).to(self._accelerator.device)
        self._whole.cpu()


def _cpu_copy(model: nn.Module) -> nn.Module:
    """Return a copy on the CPU, made without a second copy of the parameters on the device."""
    parameters: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("cpu", copy=True), p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, parameters).cpu()


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a model, in order: the units that FSDP2 gathers one at a time.

    They are the children of each outermost nn.ModuleList and nn.Sequential whose children have one class and have
    parameters.
    """
    found: list[nn.Module] = []
    for child in model.children():
        items = list(child.children()) if isinstance(child, nn.ModuleList | nn.Sequential) else []
        repeated = len({type(item) for item in items}) == 1 and all(any(True for _ in i.parameters()) for i in items)
        found += items if repeated else blocks(child)
    return found


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a DTensor, a collective of all ranks; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(parameter: Tensor, whole: Tensor) -> Tensor:
    """Return `whole`, which every rank has, in shards like `parameter`; the inverse of `full`, without communication.

    A tensor of another shape, such as a step count, and any tensor for a parameter without shards stay as they are.
    """
    if not isinstance(parameter, DTensor) or whole.shape != parameter.shape:
        return whole
    whole = whole.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Return the 2-norm () of all gradients together; with DTensors a collective of all ranks."""
    return full(torch.nn.utils.get_total_norm(list(gradients)))


def sum_over_ranks(accelerator: Accelerator, *values: float) -> list[float]:
    """Return the sums of numbers over all ranks, which call this together."""
    if accelerator.num_processes == 1:
        return list(values)
    total: Any = accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device), "sum")
    return total.tolist()


def on_main_process(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """Call a function on the main process; return its result, or raise its ReportedError, on all ranks."""
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [(function(), None)]
        except ReportedError as error:
            outcome = [(None, error)]
    result, error = broadcast_object_list(outcome)[0]
    if error is not None:
        error.on_all_ranks = True
        raise error
    return result
