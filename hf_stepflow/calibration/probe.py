"""Probes before a calibration: which problems the model solves sometimes, and how many it answers fastest at once."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Shares of problems solved between which settings can gain and lose.
LOW, HIGH = 0.2, 0.8

# Families of problems that a suggestion aims at, and the problems of one probe.
WANTED = 2
PROBED = 12

# The largest batch, the share by which a doubling has to be faster, and the tokens written in a trial.
MOST = 256
FASTER = 1.1
_TOKENS = 24

# The share of the free memory that the keys and values of a batch may take.
_SHARE = 0.5


@dataclass(frozen=True)
class Probe:
    """One source, tried.

    Attributes:
        source: The name of the source.
        solved: The number of problems solved.
        problems: The number of problems.
    """

    source: str
    solved: int
    problems: int

    @property
    def fits(self) -> bool:
        """Whether the model solves 20 to 80 % of them."""
        return LOW <= self.solved / self.problems <= HIGH

    @property
    def distance(self) -> float:
        """How far the share solved is from a half."""
        return abs(self.solved / self.problems - 0.5)

    def __str__(self) -> str:
        return f"{self.source}: {self.solved} of {self.problems} solved{', fits' * self.fits}"


def suggest_sources(
    families: Sequence[Sequence[str]], probe: Callable[[str], Probe], wanted: int = WANTED
) -> tuple[list[str], list[Probe]]:
    """Looks for sources of which the model solves 20 to 80 %, by a walk through each family from its middle.

    With a level that fits comes the next easier one, because errors that rise with length show across levels. Families
    without one give the level closest to half, unless the model solves all or none of it, if fewer than `wanted` fit.

    Args:
        families: Levels of each family, ascending in difficulty.
        probe: Tries a level.
        wanted: The number of families after which the walk ends.

    Returns:
        The suggested sources, and all that were tried, in order.
    """
    tried: list[Probe] = []
    found: list[list[str]] = []
    others: list[tuple[bool, float, list[str]]] = []
    for family in families:
        if len(found) >= wanted:
            break
        own: list[Probe] = []
        low, high = 0, len(family)
        while low < high and not (own and own[-1].fits):
            middle = (low + high) // 2
            own.append(probe(family[middle]))
            low, high = (middle + 1, high) if own[-1].solved > HIGH * own[-1].problems else (low, middle)
        tried += own
        best = min(reversed(own), key=lambda one: one.distance)  # of equals the hardest or easiest
        place = list(family).index(best.source)
        levels = list(family[max(place - 1, 0) : place + 1])
        if best.fits:
            found.append(levels)
        else:
            others.append((best.solved in (0, best.problems), best.distance, levels))
    others.sort(key=lambda one: one[:2])
    useful = [levels for is_useless, _, levels in others if not is_useless]
    if not found and not useful:
        useful = [others[0][2]]
    return [source for levels in [*found, *useful][:wanted] for source in levels], tried


def find_batch_size(speed: Callable[[int], float], most: int = MOST) -> tuple[int, list[tuple[int, float]], str]:
    """Doubles the batch until it writes no more tokens a second, or until memory ends.

    Args:
        speed: Returns the tokens a second of a batch of some size. It may raise `MemoryError` or
            `torch.OutOfMemoryError`.
        most: The largest batch to try.

    Returns:
        The batch size, the sizes tried with their tokens a second, and why it went no further.

    Raises:
        MemoryError: One row alone does not fit. On an accelerator: torch.OutOfMemoryError.
    """
    tried: list[tuple[int, float]] = []
    size, best = 1, (1, 0.0)
    while size <= most:
        try:
            found = speed(size)
        except (MemoryError, torch.OutOfMemoryError):
            if not tried:
                raise
            return best[0], tried, f"{size} do not fit into memory"
        tried.append((size, found))
        if found < FASTER * best[1]:
            return best[0], tried, f"{size} are no faster"
        best = (size, found)
        size *= 2
    return best[0], tried, f"{most} is the limit"


def decoding_speed(model: Any, prompts: Sequence[Sequence[int]], size: int, length: int) -> float:
    """Returns the tokens a second that greedy decoding writes in a batch.

    Args:
        model: The model.
        prompts: Token ids of prompts, repeated as often as needed.
        size: The number of rows.
        length: The largest number of tokens of a row, prompt included, for which memory has to suffice.

    Raises:
        MemoryError: The keys and values of such a batch would take more than half of the free memory.
    """
    free = free_memory(model.device)
    needed = size * length * cache_bytes(model)
    if free is not None and needed > _SHARE * free:
        raise MemoryError(f"{size} rows of {length} tokens take {needed} bytes, and {free} are free")
    rows = [list(prompts[at % len(prompts)]) for at in range(size)]
    width = max(map(len, rows))
    ids = torch.zeros(size, width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for at, row in enumerate(rows):
        ids[at, width - len(row) :] = torch.tensor(row)
        mask[at, width - len(row) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    start = time.perf_counter()
    arguments = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "pad_token_id": 0}
    with torch.inference_mode():
        made = model.generate(
            input_ids=ids, attention_mask=mask, min_new_tokens=_TOKENS, max_new_tokens=_TOKENS, **arguments
        )
        made.sum().item()  # waits for the device
    return size * _TOKENS / (time.perf_counter() - start)


def cache_bytes(model: Any) -> int:
    """Returns the bytes that keys and values of one token take; a bound where layers keep a window only."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * torch.tensor([], dtype=model.dtype).element_size()


def free_memory(device: torch.device) -> int | None:
    """Returns the free memory of a device in bytes; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if device.type == "cpu" and path.exists() else []
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return sizes[0] if sizes else None
