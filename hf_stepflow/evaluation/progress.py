"""The progress of a run while it goes on: responses done, paired differences, tokens per second and the time left."""

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria

_SECONDS = 0.5  # between two looks at a batch that runs


class TokenCounter(StoppingCriteria):
    """Counts the tokens of a batch while `generate` writes them; it never stops anything.

    Args:
        report: A function that is called with the number of tokens so far, about twice a second.
        width: The tokens of a prompt, padding included.
        pad: The token that fills rows which have ended.
    """

    def __init__(self, report: Callable[[int], Any], width: int, pad: int):
        self._report = report
        self._width = width
        self._pad = pad
        self._next = time.perf_counter() + _SECONDS

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        """Takes all tokens [B, T] and returns False for every row: bool [B]."""
        if time.perf_counter() >= self._next:
            self._report(int((input_ids[:, self._width :] != self._pad).sum()))
            self._next = time.perf_counter() + _SECONDS
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]


class RunProgress:
    """The progress bar of an evaluation.

    Args:
        arms: The names of the arms, the reference first.
        expected: The number of responses of each arm.
        results: The results so far; the caller appends to this list.
        max_new_tokens: The number of tokens that a response may have, by arm.
        is_shown: Whether to show it.
    """

    def __init__(
        self,
        arms: Sequence[str],
        expected: int,
        results: Sequence[Mapping[str, Any]],
        max_new_tokens: Mapping[str, int],
        is_shown: bool,
    ):
        from huggingface_hub.utils import tqdm

        self._arms = list(arms)
        self._expected = expected
        self._results = results
        self._limits = max_new_tokens
        self._bar = tqdm(
            total=expected * len(self._arms),
            initial=len(results),
            disable=not is_shown,
            bar_format="{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} responses [{elapsed}{postfix}]",
        )
        self._found = running_accuracies(self._arms, results)
        self._begin("", 0)

    def begin(self, arm: str, size: int) -> None:
        """Begins a batch of `size` responses."""
        self._begin(arm, size)
        self._show(0)

    def _begin(self, arm: str, size: int) -> None:
        self._arm, self._size, self._start = arm, size, time.perf_counter()

    def count(self, tokens: int) -> None:
        """Takes the number of tokens that the batch has so far."""
        self._show(tokens)

    def end(self) -> None:
        """Ends the batch, whose results have been appended."""
        tokens = sum(one["tokens"] for one in self._results[len(self._results) - self._size :])
        self._found = running_accuracies(self._arms, self._results)
        self._show(tokens, refresh=False)
        self._bar.update(self._size)
        self._begin("", 0)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()

    def _show(self, tokens: int, refresh: bool = True) -> None:
        spent = time.perf_counter() - self._start
        parts = [self._found] if self._found else []
        if tokens and spent > 0:
            parts.append(f"{tokens / spent:,.0f} tokens/s")
        left = self._seconds_left(tokens, spent)
        if left:
            parts.append(left)
        self._bar.set_postfix_str(", ".join(parts), refresh=refresh)

    def _seconds_left(self, tokens: int, spent: float) -> str:
        """The time left by the mean of each arm's responses; before there are any, at most by the longest response."""
        counts = dict.fromkeys(self._arms, 0)
        seconds = dict.fromkeys(self._arms, 0.0)
        for one in self._results:
            counts[one["arm"]] += 1
            seconds[one["arm"]] += one["seconds"]
        missing = {name: self._expected - counts[name] for name in self._arms}
        known = {name: seconds[name] / counts[name] for name in self._arms if counts[name]}
        if known:
            typical = sum(known.values()) / len(known)
            left = sum(number * known.get(name, typical) for name, number in missing.items())
            if self._size and self._arm in self._arms:
                left -= min(spent, self._size * known.get(self._arm, typical))
            return f"{_clock(left)} left"
        if not tokens or not self._size:
            return ""
        limit = self._limits[self._arm] * self._size  # tokens that the batch may have
        most = spent / tokens * limit / self._size * sum(missing.values())
        return f"{_clock(most - spent)} left at most"


def running_accuracies(arms: Iterable[str], results: Iterable[Mapping[str, Any]]) -> str:
    """The accuracy of the first arm, and the points by which each other arm differs on what both have answered.

    Args:
        arms: The names of the arms, the first being the reference.
        results: The results so far.
    """
    right: dict[str, dict[tuple[str, int], bool]] = {name: {} for name in arms}
    for one in results:
        right[one["arm"]][one["problem"], one["sample"]] = one["right"]
    (first, reference), *others = right.items()
    if not reference:
        return ""
    parts = [f"{first} {sum(reference.values()) / len(reference):.1%}"]
    for name, own in others:
        shared = own.keys() & reference.keys()
        if shared:
            points = 100 * sum(own[key] - reference[key] for key in shared) / len(shared)
            parts.append(f"{name} {points:+.1f} (n = {len(shared)})")
    return ", ".join(parts)


def show_speed(bar: Any, start: float, tokens: int) -> None:
    """Shows the tokens of the batch that runs behind a progress bar.

    Args:
        bar: The bar, of tqdm.
        start: The time at which the batch began, by `time.perf_counter`.
        tokens: The number of its tokens so far.
    """
    bar.set_postfix_str(f"{tokens:,} tokens in this batch, {tokens / (time.perf_counter() - start):,.0f} tokens/s")


def announce(text: str, is_shown: bool = True) -> None:
    """Writes a line above the progress bars, to the standard error, unless progress is not shown."""
    from huggingface_hub.utils import are_progress_bars_disabled, tqdm

    if is_shown and not are_progress_bars_disabled():
        tqdm.write(text, file=sys.stderr)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
