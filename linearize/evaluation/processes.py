"""Several processes that share the columns of one comparison: started by a launcher, one for each device.

A launcher (`accelerate launch`, torchrun) tells each process its number in the environment. The processes exchange
settings and finished columns through gloo, whatever the models run on; weights are never divided. When one process
ends with an error, the launcher ends the others, whose finished tasks are on disk by then.
"""

import contextlib
import os
from collections.abc import Collection, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from linearize.checkpoint.reading import launched
from linearize.errors import InputError

PATIENCE = timedelta(days=30)
"""Time after which a process stops waiting for another one: a column of a large model takes hours."""


class Processes:
    """This process among those that the launcher started; one alone without a launcher.

    Attributes:
        rank, count: number of this process, and how many there are.
    """

    def __init__(self) -> None:
        with launched():
            self.rank, self.count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def is_main(self) -> bool:
        """Whether this process talks to the user and writes the results."""
        return self.rank == 0

    @property
    def device(self) -> str | None:
        """The GPU of this process, as the launcher counts them; None where there is no choice to make."""
        if self.count == 1 or not torch.cuda.is_available():
            return None
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"

    @contextlib.contextmanager
    def joined(self) -> Iterator["Processes"]:
        """Connect the processes for the time of a run.

        Raises:
            InputError: the launcher was told to divide weights, or the environment tells half of what a launcher does.
        """
        if self.count == 1:
            yield self
            return
        if any(os.environ.get(f"ACCELERATE_USE_{way}", "").lower() == "true" for way in ("FSDP", "DEEPSPEED")):
            raise InputError(
                "eval: every process measures columns of its own with all weights, so they cannot be divided by FSDP "
                "or DeepSpeed; launch it with `--multi_gpu --num_processes N` instead of that configuration"
            )
        if self.device is not None:
            torch.cuda.set_device(self.device)
        with launched():
            distributed.init_process_group("gloo", timeout=PATIENCE)
        try:
            yield self
        finally:
            distributed.destroy_process_group()

    def share(self, names: list[str], kept: Collection[str] = ()) -> list[str]:
        """This process's columns: neighbours, which share weights, and as many as others have, give or take one.

        Args:
            names: all columns, in order.
            kept: those of an earlier run, which cost nothing: the main process has them besides.
        """
        left = [name for name in names if name not in kept]
        start, end = (-(-len(left) * rank // self.count) for rank in (self.rank, self.rank + 1))
        return [name for name in names if name in left[start:end] or self.is_main and name in kept]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in each of them, when the last one has come here."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """A block that no process leaves before all have come to its end. Bad input in it, mostly the same in all
        processes, is told by the first one of them.

        Raises:
            InputError: that of the block, in the first process that met one. The others end with exit code 2.
        """
        error = None
        try:
            yield
        except InputError as raised:
            error = raised
        failed = [rank for rank, bad in enumerate(self.gather(error is not None)) if bad]
        if error is not None and failed[0] == self.rank:
            raise error
        if failed:
            raise SystemExit(2)
