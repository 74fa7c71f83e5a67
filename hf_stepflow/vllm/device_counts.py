"""Counts that kernels add up on the device, brought to the host behind the passes.

Shapes: three numbers: tokens bridged, tokens injected, and the greatest position before which a record was lost.
"""

import queue
import threading

import torch
from torch import Tensor

from .counters import Counters


class DeviceCounts:
    """The counts of one worker.

    After each pass a copy starts, and a thread waits for it, so that no pass does.

    Args:
        device: The device.
        counters: Where the counts go; None for nowhere.

    Attributes:
        sums: int64 [3] on the device, which kernels add to.

    Example:
        >>> counts = DeviceCounts(torch.device("cpu"), None)
        >>> counts.sums[2] = 20
        >>> counts.send()
        >>> counts.wait()
        >>> counts.lost
        20
    """

    def __init__(self, device: torch.device, counters: Counters | None):
        self.sums = torch.zeros(3, dtype=torch.int64, device=device)
        self.lost = 0
        self._counters, self._seen = counters, [0, 0]
        self._copies: queue.SimpleQueue[tuple[Tensor, torch.cuda.Event | None]] = queue.SimpleQueue()
        self._idle = threading.Condition()
        self._sent = self._taken = 0
        threading.Thread(target=self._take, name="stepflow-counts", daemon=True).start()

    def send(self) -> None:
        """Starts a copy of the sums as they are after what the stream holds so far."""
        if self.sums.device.type == "cuda":
            copy, event = self.sums.to("cpu", non_blocking=True), torch.cuda.Event(blocking=True)
            event.record()
        else:
            copy, event = self.sums.clone(), None
        self._sent += 1
        self._copies.put((copy, event))

    def wait(self) -> None:
        """Returns when all copies have arrived."""
        with self._idle:
            self._idle.wait_for(lambda: self._taken == self._sent)

    def _take(self) -> None:
        while True:
            copy, event = self._copies.get()
            if event is not None:
                event.synchronize()
            bridged, injected, self.lost = copy.tolist()
            if self._counters is not None:
                self._counters.add(bridged_tokens=bridged - self._seen[0], injections=injected - self._seen[1])
            self._seen = [bridged, injected]
            with self._idle:
                self._taken += 1
                self._idle.notify_all()
