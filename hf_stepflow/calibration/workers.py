"""The processes that share a calibration: one, or those that `accelerate launch` has started."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from hf_stepflow.runtime.errors import StepFlowError

Item = TypeVar("Item")

# How long processes wait for the slowest of them, which may be working on a long batch.
_PATIENCE = timedelta(hours=12)


@dataclass
class Workers:
    """This process among those that share the work. They meet in the work folder, on one file system.

    Attributes:
        rank: its number.
        count: how many there are.
        group: what they wait for one another by.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    @classmethod
    def join(cls) -> "Workers":
        """The workers that the environment tells of (RANK, WORLD_SIZE ..., as accelerate and torchrun set them)."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count < 2:
            return cls()
        from torch import distributed

        if distributed.is_initialized():
            group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        else:
            distributed.init_process_group("gloo", timeout=_PATIENCE)
            group = None
        return cls(distributed.get_rank(), count, group)

    @property
    def is_first(self) -> bool:
        """Whether this process decides, and speaks for all."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part."""
        return items[self.rank :: self.count]

    def wait(self) -> None:
        """Returns once all have come here.

        Raises:
            StepFlowError: one of them is gone.
        """
        if self.count < 2:
            return
        from torch import distributed

        try:
            distributed.barrier(self.group)
        except RuntimeError as error:
            raise StepFlowError(
                f"another process of this calibration is gone: {(str(error) or 'no reason given').splitlines()[0]}",
                hint="start the same command again: it goes on where it was",
            ) from error
