"""Compares correct traces with wrong ones: the layers in which the indices of Step-Saliency separate them.

Shapes: L layers, n traces.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy import special, stats

from hf_stepflow.runtime.errors import StepFlowInputError

from .maps import INDICES, StepMaps

CONFIDENCE = 0.95
RESAMPLES = 9999

# Values that are resampled at once in a layer: large enough for numpy, small enough for the cache.
_BATCH = 2**16

# Layers of each index in the table.
_SHOWN = 3


@dataclass(frozen=True)
class LayerDifference:
    """One index in one layer.

    Attributes:
        layer: The index of the layer in the model.
        n_correct, n_wrong: Traces in which the index is a number; with pairs, traces in which it is one in both.
        mean_correct, mean_wrong: The means over these traces.
        difference: Wrong minus correct.
        low, high: The bootstrap interval of the difference at `CONFIDENCE`, by percentiles.
        effect: The difference in standard deviations, see `SaliencyComparison.effect_name`; NaN without a spread.
        p_value: The p-value of the two-sided permutation test; 1 where all values are equal, NaN for too few values.
        adjusted: The p-value, adjusted over the layers of the index.
        separates: Whether the adjusted p-value is at most the level.
    """

    layer: int
    n_correct: int
    n_wrong: int
    mean_correct: float = math.nan
    mean_wrong: float = math.nan
    difference: float = math.nan
    low: float = math.nan
    high: float = math.nan
    effect: float = math.nan
    p_value: float = math.nan
    adjusted: float = math.nan
    separates: bool = False


@dataclass(frozen=True)
class SaliencyComparison:
    """The result of `compare`; `str()` gives a table.

    Attributes:
        layers: The index in the model of each of the L layers.
        indices: {name: L differences}, by the names of `INDICES`.
        traces: The numbers of correct and of wrong traces.
        paired: Whether the i-th traces of both groups belong together.
        level: The adjusted p-value up to which groups count as separate.
        resamples: Resamples of each permutation test and bootstrap; all permutations are tried if there are fewer.
        seed: The seed of the resampling.
        about: The model, loss and pooling that all traces share.
    """

    layers: list[int]
    indices: dict[str, list[LayerDifference]]
    traces: tuple[int, int]
    paired: bool
    level: float
    resamples: int
    seed: int
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def effect_name(self) -> str:
        """The name of the effect size in `LayerDifference.effect`."""
        return "Cohen's d_z, corrected for small samples" if self.paired else "Hedges' g"

    def separating(self, index: str) -> list[int]:
        """Returns the layers in which an index separates the groups.

        Raises:
            StepFlowInputError: If there is no such index.
        """
        return [one.layer for one in self._of(index) if one.separates]

    def bands(self, index: str) -> list[tuple[int, int]]:
        """Returns runs of separating layers in which the difference keeps its sign, as (first, last), both included.

        Layers are neighbours if the maps have no layer between them: a band spans layers without softmax attention.

        Raises:
            StepFlowInputError: If there is no such index.
        """
        found: list[tuple[int, int]] = []
        before = None
        for one in self._of(index):
            sign = math.copysign(1, one.difference) if one.separates else None
            if sign is not None:
                found.append((found.pop()[0] if sign == before else one.layer, one.layer))
            before = sign
        return found

    def to_dict(self) -> dict[str, Any]:
        """Returns the comparison, ready for JSON; NaN becomes None."""
        return {
            "layers": self.layers,
            "traces": {"correct": self.traces[0], "wrong": self.traces[1]},
            "paired": self.paired,
            "level": self.level,
            "resamples": self.resamples,
            "seed": self.seed,
            "about": self.about,
            "methods": {
                "difference": "wrong minus correct",
                "interval": f"{CONFIDENCE:.0%} bootstrap, percentiles",
                "effect": self.effect_name,
                "p_value": "permutation test, two-sided",
                "adjusted": "Benjamini-Hochberg, over the layers of an index",
            },
            "indices": {
                name: {
                    "separating": self.separating(name),
                    "bands": [list(band) for band in self.bands(name)],
                    "layers": [
                        {key: None if value != value else value for key, value in asdict(one).items()} for one in rows
                    ],
                }
                for name, rows in self.indices.items()
            },
        }

    def __str__(self) -> str:
        effect = "d_z" if self.paired else "g"
        groups = f"{self.traces[0]} correct and {self.traces[1]} wrong traces"
        lines = [
            f"{groups}{' in pairs' if self.paired else ''}, {len(self.layers)} layers.",
            "Differences are wrong minus correct, with 95 % bootstrap intervals (percentiles);",
            f"{effect} is {self.effect_name}; p of permutations, Benjamini-Hochberg over layers.",
            "",
            f"{'index':14}{'layer':>5} {'correct':>10} {'wrong':>10} {'difference':>11} {'interval':>24} "
            f"{effect:>6} {'p':>7}",
        ]
        for name, rows in self.indices.items():
            tested = sorted((one for one in rows if not math.isnan(one.p_value)), key=_strength)
            if not tested:
                lines.append(f"{name:14}too few traces have it")
                continue
            lines += [f"{'' if place else name:14}{_line(one)}" for place, one in enumerate(tested[:_SHOWN])]
            bands = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in self.bands(name))
            counts = f"n = {tested[0].n_correct} and {tested[0].n_wrong}"
            lines.append(f"{'':14}separates {f'in layers {bands}' if bands else 'in no layer'} ({counts})")
        return "\n".join(lines)

    def _of(self, index: str) -> list[LayerDifference]:
        if index not in self.indices:
            raise StepFlowInputError(f"index must be one of {', '.join(self.indices)}, got {index!r}")
        return self.indices[index]


def compare(
    correct: Sequence[StepMaps],
    wrong: Sequence[StepMaps],
    *,
    paired: bool = False,
    seed: int = 0,
    level: float = 0.05,
    resamples: int = RESAMPLES,
) -> SaliencyComparison:
    """Compares the indices of two groups of traces, layer by layer.

    An index leaves out the traces in which it is not a number (a trace without a summary has no decay); with pairs,
    the whole pair.

    Args:
        correct: The maps of traces with the right answer, a list of `StepSaliency`.
        wrong: The maps of traces with a wrong answer.
        paired: Whether the i-th traces of both belong together, as two answers to one problem.
        seed: The seed of the resampling.
        level: The adjusted p-value up to which groups count as separate, in (0, 1).
        resamples: The number of resamples of each permutation test and each bootstrap.

    Returns:
        Differences, intervals, effect sizes and p-values by index and layer; `print` shows a table.

    Raises:
        StepFlowInputError: If a group has fewer than two traces, pairs do not match, the traces differ in model, loss,
            layers or pooling, or `level` or `resamples` is out of range.

    Example:
        >>> import torch
        >>> from hf_stepflow import StepSaliency, Trace
        >>> from hf_stepflow.saliency.compare import compare
        >>> trace = Trace([0, 1], [0, 1])
        >>> maps = [StepSaliency(torch.tensor([[[1.0, 0.0], [a, 1.0]]]), [0], trace) for a in (1, 2, 3, 4, 5, 6, 7, 8)]
        >>> compare(maps[:4], maps[4:]).separating("question")
        [0]
    """
    for name, group in (("correct", correct), ("wrong", wrong)):
        if isinstance(group, StepMaps) or not isinstance(group, Sequence):
            raise StepFlowInputError(f"{name} must be a list of StepSaliency, got {type(group).__name__}")
        if len(group) < 2:
            raise StepFlowInputError(
                f"{name} must hold 2 traces or more, got {len(group)}",
                hint="a comparison rests on the spread between traces; give some dozens of each",
            )
    if paired and len(correct) != len(wrong):
        raise StepFlowInputError(
            f"pairs need as many correct as wrong traces, got {len(correct)} and {len(wrong)}",
            hint="give them in the same order, or leave out paired=True",
        )
    if not 0 < level < 1:
        raise StepFlowInputError(f"level must lie between 0 and 1, got {level}")
    if resamples < 1:
        raise StepFlowInputError(f"resamples must be 1 or more, got {resamples}")
    check_comparable([*correct, *wrong])
    values = index_values(correct), index_values(wrong)
    first = correct[0]
    return SaliencyComparison(
        layers=list(first.layers),
        indices={
            name: _layer_differences(values[0][name], values[1][name], first.layers, paired, resamples, seed, level)
            for name in INDICES
        },
        traces=(len(correct), len(wrong)),
        paired=paired,
        level=level,
        resamples=resamples,
        seed=seed,
        about={**{key: first.about.get(key) for key in ("model", "loss")}, "pooling": first.pooling},
    )


def check_comparable(group: Sequence[StepMaps]) -> None:
    """Checks that all are maps, of the same layers, pooling, model and loss.

    Raises:
        StepFlowInputError: If they are not.
    """
    for one in group:
        if not isinstance(one, StepMaps):
            raise StepFlowInputError(f"traces must be given as StepSaliency, got {type(one).__name__}")
    expected = _origin(group[0])
    for other in group[1:]:
        for name, its in _origin(other).items():
            if expected[name] != its:
                raise StepFlowInputError(
                    f"all traces must have the same {name}, got {expected[name]!r} and {its!r}",
                    hint="make all maps by one call of step_saliency, or by calls with the same arguments",
                )


def _origin(maps: StepMaps) -> dict[str, Any]:
    """The properties that comparable maps share; a file gives the loss (position, token) as a list."""
    model, loss = maps.about.get("model"), maps.about.get("loss")
    loss = list(loss) if isinstance(loss, tuple) else loss
    return {"layers": list(maps.layers), "pooling": maps.pooling, "model": model, "loss": loss}


def index_values(group: Sequence[StepMaps]) -> dict[str, np.ndarray]:
    """The indices of a group of traces, {name: float64 [L, n]}; NaN where an index is not a number."""
    each = [one.indices for one in group]
    found = {name: np.stack([one[name].numpy() for one in each], axis=1) for name in INDICES}
    return {name: np.where(np.isfinite(values), values, np.nan) for name, values in found.items()}


def _strength(one: LayerDifference) -> tuple[float, float]:
    """Sorts layers, the best separation first."""
    return one.adjusted, -abs(one.effect) if not math.isnan(one.effect) else 0.0


def _line(one: LayerDifference) -> str:
    """A line of the table, without the index."""
    interval = f"[{one.low:+.4g}, {one.high:+.4g}]"
    effect = "-" if math.isnan(one.effect) else f"{one.effect:+.2f}"
    return (
        f"{one.layer:5} {one.mean_correct:10.4g} {one.mean_wrong:10.4g} {one.difference:+11.4g} {interval:>24} "
        f"{effect:>6} {one.adjusted:7.4f}{'*' if one.separates else ''}"
    )


def _layer_differences(
    correct: np.ndarray, wrong: np.ndarray, layers: list[int], paired: bool, resamples: int, seed: int, level: float
) -> list[LayerDifference]:
    """Compares one index, [L, n] in both groups."""
    here, there = ~np.isnan(correct), ~np.isnan(wrong)
    if paired:
        here = there = here & there
    x, y = (np.ma.array(values, mask=~some) for values, some in ((correct, here), (wrong, there)))
    means = [values.mean(-1).filled(np.nan) for values in (x, y)]
    tested = np.full((5, len(layers)), np.nan)
    tested[0] = means[1] - means[0]
    # Layers in which the same traces have a number are resampled together.
    patterns, kinds = np.unique(np.concatenate([here, there], 1), axis=0, return_inverse=True)
    for kind, pattern in enumerate(patterns):
        one, other = np.split(pattern, [correct.shape[1]])
        if min(one.sum(), other.sum()) >= 2:
            rows = kinds.reshape(-1) == kind
            tested[:, rows] = _tested(correct[rows][:, one], wrong[rows][:, other], paired, resamples, seed)
    adjusted, some = np.full(len(layers), np.nan), ~np.isnan(tested[-1])
    if some.any():
        adjusted[some] = stats.false_discovery_control(tested[-1, some], method="bh")
    numbers = np.stack([*means, *tested, adjusted]).tolist()
    columns = layers, here.sum(1).tolist(), there.sum(1).tolist(), *numbers, (adjusted <= level).tolist()
    return [LayerDifference(*row) for row in zip(*columns, strict=True)]


def _tested(x: np.ndarray, y: np.ndarray, paired: bool, resamples: int, seed: int) -> np.ndarray:
    """The difference, interval, effect and p-value of correct x and wrong y, [L, n] each, as [5, L]."""
    data = (y - x,) if paired else (x, y)
    found = np.zeros((5, len(x)))
    found[3:] = np.array([[0.0], [1.0]])
    # Equal values have nothing to compare but the rounding of their means.
    least, most = np.minimum(x.min(-1), y.min(-1)), np.maximum(x.max(-1), y.max(-1))
    spread = most - least > 1e-12 * np.maximum(np.abs(least), np.abs(most))
    if paired:
        spread &= np.abs(data[0]).max(-1) > 0
    if not spread.any():
        return found
    data = tuple(one[spread] for one in data)
    batch = max(1, _BATCH // sum(one.shape[1] for one in data))
    options: dict[str, Any] = {"vectorized": True, "n_resamples": resamples, "batch": batch, "axis": -1}
    interval = stats.bootstrap(
        data,
        _difference,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
        **options,
    ).confidence_interval
    kind = "samples" if paired else "independent"
    test = stats.permutation_test(data, _difference, permutation_type=kind, rng=np.random.default_rng(seed), **options)
    found[:, spread] = test.statistic, interval.low, interval.high, _effect(*data), test.pvalue
    return found


def _difference(*data: np.ndarray, axis: int) -> np.ndarray:
    """The mean of the pairs' differences, or the mean of the second group minus that of the first."""
    return data[-1].mean(axis) - data[0].mean(axis) if len(data) == 2 else data[0].mean(axis)


def _effect(*data: np.ndarray) -> np.ndarray:
    """Hedges' g for two groups, Cohen's d_z with the same exact correction for the pairs' differences, [L]."""
    freedom = sum(one.shape[1] - 1 for one in data)
    spread = np.sqrt(sum(one.shape[1] * one.var(-1) for one in data) / freedom)
    scale = np.maximum.reduce([np.abs(one).max(-1) for one in data])
    effect = np.full(len(spread), np.nan)
    some = spread > 1e-12 * scale
    if freedom > 1:
        correction = special.poch((freedom - 1) / 2, 0.5) / math.sqrt(freedom / 2)
        effect[some] = correction * _difference(*data, axis=-1)[some] / spread[some]
    return effect
