"""Tally: the running sums behind the report, kept on the device and read once."""

import torch

# Columns of Tally.sums, per row and layer.
BRIDGE_QUERIES, BRIDGED, MASS_BEFORE, MASS_AFTER, INJECTIONS, INJECTION_NORM = range(6)
COLUMNS = 6

# Decode steps that a layer may note before they are added up: bounds memory, and spreads the cost of adding.
_NOTES = 32

Note = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Tally:
    """Sums over the queries of each row and layer.

    Attributes:
        sums: float32 [B, layers, COLUMNS].
    """

    def __init__(self, batch: int, layers: tuple[int, ...], device: torch.device):
        self.sums = torch.zeros(batch, len(layers), COLUMNS, device=device)
        self._place = {layer: index for index, layer in enumerate(layers)}
        self._notes: dict[int, list[Note]] = {}

    def copy(self) -> "Tally":
        """An independent copy."""
        self.settle()
        copied = object.__new__(Tally)
        copied.sums, copied._place, copied._notes = self.sums.clone(), self._place, {}
        return copied

    def add_injections(self, layer: int, number: torch.Tensor, norm: torch.Tensor) -> None:
        """Adds injections of a layer: how many in each row and the sum of their relative norms, [B] each."""
        amounts = torch.stack((number, norm), 1).to(self.sums.device, self.sums.dtype)
        self.sums[:, self._place[layer], INJECTIONS:] += amounts

    @torch.no_grad()
    def add_bridge(self, layer: int, before: torch.Tensor, after: torch.Tensor, usable: torch.Tensor) -> None:
        """Adds the bridge of some queries.

        Args:
            layer: the layer.
            before: mass of the bridge without the floor, [B, H, c].
            after: its mass with it, [B, H, c].
            usable: where the bridge had a say (non-zero), broadcastable to them.
        """
        chosen = usable.expand_as(before) > 0
        counts = torch.stack((chosen, (after > before) & chosen, before * chosen, after * chosen), -1)
        self.sums[:, self._place[layer], : MASS_AFTER + 1] += counts.sum((1, 2)).to(self.sums.device, self.sums.dtype)

    def note_bridge(self, layer: int, before: torch.Tensor, after: torch.Tensor, usable: torch.Tensor) -> None:
        """As `add_bridge` for one query a row, added up later: before, after [B, H], usable [B, 1 or H]."""
        notes = self._notes.setdefault(layer, [])
        notes.append((before.detach(), after.detach(), usable))
        if len(notes) >= _NOTES:
            self._settle(layer)

    def settle(self) -> None:
        """Adds up what was noted."""
        for layer in list(self._notes):
            self._settle(layer)

    def _settle(self, layer: int) -> None:
        notes = self._notes.pop(layer)
        before, after = (torch.stack([note[column] for note in notes], 2) for column in (0, 1))
        usable = torch.stack([note[2].expand_as(note[0]) for note in notes], 2)
        self.add_bridge(layer, before, after, usable)

    def select(self, rows: torch.Tensor) -> None:
        """Takes rows by index."""
        self.settle()
        self.sums = self.sums.index_select(0, rows)

    def repeat(self, times: int) -> None:
        """Repeats each row in place."""
        self.settle()
        self.sums = self.sums.repeat_interleave(times, 0)

    def zero_(self) -> None:
        """Forgets everything."""
        self._notes.clear()
        self.sums.zero_()
