"""Where a training run happens: one device with plain torch, or several processes and other precisions by accelerate."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from attrim.errors import AttrimWarning, InputError, MissingDependencyError
from attrim.modules.batches import Batch, run_batch
from attrim.recover.recipe import Precision

__all__ = ["Accelerated", "Engine", "make_engine"]


class Student(nn.Module):
    """A network that is called with a :class:`Batch`; wrappers go around this one, and the network stays bare."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Batch) -> Any:
        """The network's outputs."""
        return run_batch(self.network, batch)


class Engine:
    """One process on one device, in the precision of the weights. Needs torch alone.

    Args:
        device: where the model is.

    Attributes:
        rank: number of this process.
        world: number of processes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.rank, self.world = device, 0, 1

    @property
    def main(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """What is called with a :class:`Batch`, and what is stepped."""
        return Student(network), optimizer

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``."""
        loss.backward()  # type: ignore[no-untyped-call]

    def clip(self, parameters: Iterable[Tensor], norm: float) -> None:
        """Scale gradients down to a common norm."""
        nn.utils.clip_grad_norm_(parameters, norm)

    def alone(self, prepared: nn.Module) -> AbstractContextManager[Any]:
        """A block in which gradients are not yet exchanged between processes."""
        return nullcontext()

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of forward passes."""
        return nullcontext()

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        return values

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order."""
        return [value]

    def from_main(self, value: Any) -> Any:
        """The main process's value."""
        return value

    def agree(self, network: nn.Module) -> None:
        """Give every process the main one's buffers (batch-norm statistics are measured by each on its share)."""

    def scaler(self) -> Any:
        """The loss scaler of fp16, or None."""
        return None

    def close(self) -> None:
        """Leave things as they were found."""


class Accelerated(Engine):
    """Several processes, or a precision of its own, by Hugging Face accelerate.

    Args:
        device: where the model is; with several processes each takes the one that accelerate gives it.
        precision: of forward passes.
        several: whether there is more than one process.

    Raises:
        MissingDependencyError: accelerate is not installed.
        InputError: accelerate is already set up otherwise, or for a way of sharding that is not supported.
    """

    def __init__(self, device: torch.device, precision: Precision, several: bool) -> None:
        super().__init__(device)
        try:
            from accelerate import Accelerator, DistributedType
            from accelerate.state import AcceleratorState, PartialState
        except ImportError as error:
            purpose = "training in several processes" if several else f"precision='{precision}'"
            raise MissingDependencyError("accelerate", "train", purpose) from error
        if several:
            _name_ranks()
        self._states = (AcceleratorState, PartialState)
        self._ours = (not AcceleratorState._shared_state, not several and not PartialState._shared_state)
        cpu = not _use_gpus() if several else device.type == "cpu"
        try:
            self._accelerator = Accelerator(cpu=cpu, mixed_precision=precision)
        except ValueError as error:
            raise InputError(
                f"accelerate cannot work in precision '{precision}' in this process: {error} Use the precision that it "
                "was set up with, or fine-tune in a process of its own."
            ) from error
        kinds = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        if self._accelerator.distributed_type not in kinds:
            raise InputError(
                f"accelerate is set up for {self._accelerator.distributed_type}; fine-tuning runs on one device or with "
                "a whole copy of the network in every process. Run 'accelerate config' anew, without sharding."
            )
        found = self._accelerator.device
        if not several and found.type != device.type:
            raise InputError(
                f"the model is on '{device}', and accelerate is set up for '{found}' in this process. Move the model "
                f"there: model.to('{found}')."
            )
        self.rank, self.world = self._accelerator.process_index, self._accelerator.num_processes
        self.device = found if several else device

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """What is called with a :class:`Batch`, and what is stepped."""
        prepared: tuple[nn.Module, Any] = self._accelerator.prepare(
            Student(network), optimizer, device_placement=[False, False]
        )
        return prepared

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``, scaled where the precision needs it."""
        self._accelerator.backward(loss)

    def clip(self, parameters: Iterable[Tensor], norm: float) -> None:
        """Scale gradients down to a common norm."""
        self._accelerator.clip_grad_norm_(parameters, norm)

    def alone(self, prepared: nn.Module) -> AbstractContextManager[Any]:
        """A block in which gradients are not yet exchanged between processes."""
        block: AbstractContextManager[Any] = self._accelerator.no_sync(prepared)
        return block

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of forward passes."""
        block: AbstractContextManager[Any] = self._accelerator.autocast()
        return block

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world > 1:
            torch.distributed.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """The main process's value."""
        if self.world == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def agree(self, network: nn.Module) -> None:
        """Give every process the main one's buffers (batch-norm statistics are measured by each on its share)."""
        if self.world > 1:
            for buffer in network.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def scaler(self) -> Any:
        """The loss scaler of fp16, or None."""
        return self._accelerator.scaler

    def close(self) -> None:
        """Forget the settings, so that a later run in this process can choose others. Process groups stay."""
        self._accelerator.free_memory()
        for state, ours in zip(self._states, self._ours, strict=True):
            if ours:
                state._reset_state()


def make_engine(device: torch.device, precision: Precision) -> Engine:
    """The engine that the situation asks for.

    accelerate is used when there are several processes (started by ``accelerate launch`` or ``torchrun``, or a process
    group that exists already) or when a precision is asked for; otherwise torch alone does the same arithmetic.

    Raises:
        MissingDependencyError: accelerate is needed and not installed.
        InputError: fp16 without a GPU.
    """
    several = processes() > 1
    if precision == "fp16" and (not _use_gpus() if several else device.type == "cpu"):
        raise InputError("precision: 'fp16' needs a GPU, and the model is on the CPU. Use 'bf16', or model.to('cuda').")
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", precision)
    if asked not in (precision, "no"):  # "no" is what the launcher says when it was told nothing
        warnings.warn(
            f"accelerate was launched with mixed precision '{asked}', fine-tuning was told precision='{precision}' and "
            "keeps to that.",
            AttrimWarning,
            stacklevel=3,
        )
    if several or precision != "no":
        return Accelerated(device, precision, several)
    return Engine(device)


def processes() -> int:
    """How many processes train together: of the process group, or as the launcher's environment says."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    launched = "RANK" in os.environ or "LOCAL_RANK" in os.environ
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if launched and size.isdigit() else 1


def _use_gpus() -> bool:
    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return False
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not ready or torch.distributed.get_backend() != "gloo"


def _name_ranks() -> None:
    """A process group that was made without a launcher: accelerate reads the ranks from the environment."""
    if not torch.distributed.is_initialized() or "LOCAL_RANK" in os.environ:
        return
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    here = max(1, torch.cuda.device_count()) if _use_gpus() else world
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank % here)}
