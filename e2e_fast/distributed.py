"""Data parallel training with torch.distributed, under torchrun.

    torchrun --nproc-per-node 8 -m e2e_fast train config.yaml

Each of R processes holds the language model and the SAEs and takes its own part of the data. With g_r the gradient of
rank r's mean loss, every rank steps with g = Σ_r g_r / R: the gradient of the mean loss over the global batch. Equal
weights and equal gradients stay equal, so nothing else is ever sent but a few numbers: flags, metrics, and BatchTopK's
thresholds, which are averaged too.

>>> World().average_gradients([])           # one process: nothing to do
>>> World().share("a folder")
'a folder'
"""

import atexit
import importlib
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class World(NamedTuple):
    """The processes that train together, seen from one of them. Its methods are to be called by all of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this machine: the number of its GPU."""

    @property
    def writes(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def device(self, wanted: str | None) -> str:
        """The device of this process: its own GPU where there are several processes.

        Raises ValueError for a device that is not there.
        """
        name = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
        name = f"cuda:{self.local_rank}" if name == "cuda" and self.size > 1 else name
        try:
            kind, number = torch.device(name).type, torch.device(name).index or 0
        except RuntimeError as error:
            raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}") from error
        if kind == "cuda" and number >= torch.cuda.device_count():
            raise ValueError(f"device {name!r} is not here: torch sees {torch.cuda.device_count()} NVIDIA GPUs")
        return name

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Each parameter's gradient becomes the mean over the processes."""
        if self.size == 1:
            return
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self.average(gradients)

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor becomes its mean over the processes, in place."""
        if self.size == 1:
            return
        tensors = list(tensors)
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            if work is not None:
                work.wait()
        for tensor in tensors:
            tensor.div_(self.size)

    def same_weights(self, parameters: Iterable[Tensor]) -> None:
        """Each parameter becomes the first process's."""
        if self.size > 1:
            for parameter in parameters:
                dist.broadcast(parameter.detach(), src=0)

    def sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the processes; the keys are the same everywhere."""
        totals = {key: value.clone() for key, value in values.items()}
        if self.size > 1:
            for total in totals.values():
                dist.all_reduce(total)
        return totals

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Means over the processes; the keys are the same everywhere."""
        if self.size == 1:
            return dict(values)
        total = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(total)
        return dict(zip(values, (total / self.size).tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags)
        return bool(flags)

    def abandon(self) -> None:
        """After an error in this process: it ends without the others, which may wait for it in a collective.

        Destroying the group would wait for them in turn. torchrun sees the process end and stops the rest.
        """
        atexit.unregister(_leave)

    def share(self, value: Any) -> Any:
        """The first process's value (any that can be pickled)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def join() -> World:
    """The processes that torchrun started together with this one, or this one alone.

    Reads torchrun's variables (WORLD_SIZE, RANK, LOCAL_RANK, …) unless torch.distributed is running already; that must
    then serve CPU tensors too ("cpu:gloo,cuda:nccl").
    """
    if not dist.is_available():
        return World()
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return World()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # torch imports this module with its compiler. Default arguments of it would keep a group that exists by then,
        # and gloo's threads with it, which abort the process where they drop a tensor while Python goes down.
        importlib.import_module("torch.distributed.nn.functional")
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(_leave)
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


def _leave() -> None:
    """Ends the group and its threads: one that is still there at the end is warned of."""
    if dist.is_initialized():
        dist.destroy_process_group()
