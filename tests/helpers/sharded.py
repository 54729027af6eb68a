"""One training stage under FSDP2 on CPUs, stopped before its fourth step and resumed; started by a launcher.

accelerate shards on accelerators only, and runs DDP on CPUs without a word; so it is told here that it shards.
"""

import sys

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from linearize import cli
from linearize.recovery import loop

begin, one_step = AcceleratorState.__init__, loop.Loop.step


def shard(self, *arguments, fsdp_plugin=None, **keywords) -> None:
    begin(self, *arguments, fsdp_plugin=fsdp_plugin, **keywords)
    self.distributed_type = DistributedType.FSDP
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin


def stop(self, step: int, checkpoint):
    if step == 4:
        raise KeyboardInterrupt
    return one_step(self, step, checkpoint)


if __name__ == "__main__":
    AcceleratorState.__init__ = shard
    loop.Loop.step = stop
    try:
        cli.main()
    except SystemExit as interrupted:
        assert interrupted.code == 130
    loop.Loop.step = one_step
    AcceleratorState._reset_state()
    sys.argv.append("--resume")
    cli.main()
