"""Probes: which problems fit a model, and which batch size is fastest."""

import pytest
import torch

from hf_stepflow.calibration import probe
from hf_stepflow.calibration.probe import (
    Probe,
    cache_bytes,
    decoding_speed,
    find_batch_size,
    free_memory,
    suggest_sources,
)
from hf_stepflow.problems import load_problems
from hf_stepflow.prompts import encode_prompt
from hf_stepflow.reasoner import load_reasoner

FAMILIES = [[f"a-{at}" for at in range(7)], [f"b-{at}" for at in range(4)], [f"c-{at}" for at in range(3)]]


def solving(rates: dict[str, float]):
    asked = []

    def one(source: str) -> Probe:
        asked.append(source)
        return Probe(source, round(10 * rates.get(source, 1.0)), 10)

    return one, asked


def test_a_level_that_fits_comes_with_the_easier_one() -> None:
    one, asked = solving({"a-5": 0.5, "a-6": 0.0, "b-0": 0.3, "b-1": 0.0, "b-2": 0.0, "b-3": 0.0})
    found, tried = suggest_sources(FAMILIES, one)
    assert found == ["a-4", "a-5", "b-0"]
    assert asked == ["a-3", "a-5", "b-2", "b-1", "b-0"]
    assert [one.source for one in tried] == asked
    assert str(tried[1]) == "a-5: 5 of 10 solved, fits"


def test_where_nothing_fits_the_closest_to_half_is_suggested() -> None:
    one, asked = solving(
        {f"{family}-{at}": 0.1 for family in "abc" for at in range(7)}
        | {"b-0": 0.0, "b-1": 0.0, "b-2": 0.0, "c-0": 1.0, "c-1": 0.9, "c-2": 0.0}
    )
    found, _ = suggest_sources(FAMILIES, one)
    assert found == ["a-0", "c-0", "c-1"]
    assert len(asked) <= 8


def test_where_all_or_nothing_is_solved_one_family_is_suggested() -> None:
    one, _ = solving({})
    assert suggest_sources(FAMILIES, one)[0] == ["a-5", "a-6"]


@pytest.mark.parametrize(
    ("speeds", "size", "reason"),
    [
        ([10, 19, 36, 38, 200], 4, "8 are no faster"),
        ([10, 5], 1, "2 are no faster"),
        ([10, 20, MemoryError], 2, "4 do not fit"),
        ([10, 20, torch.OutOfMemoryError], 2, "4 do not fit"),
        ([10, 20, 40, 80, 160], 16, "16 is the limit"),
    ],
)
def test_batches_double_while_they_get_faster(speeds: list, size: int, reason: str) -> None:
    def speed(rows: int) -> float:
        found = speeds[rows.bit_length() - 1]
        if isinstance(found, type):
            raise found
        return found

    found, tried, why = find_batch_size(speed, most=16)
    assert (found, reason in why) == (size, True)
    assert [rows for rows, _ in tried] == [2**at for at in range(len(tried))]


def test_one_row_that_does_not_fit_is_an_error() -> None:
    def speed(rows: int) -> float:
        raise MemoryError

    with pytest.raises(MemoryError):
        find_batch_size(speed)


def test_speed_and_memory_of_a_model(monkeypatch) -> None:
    model, tokenizer = load_reasoner()
    prompts = [encode_prompt(tokenizer, one.prompt) for one in load_problems("reasoner:chains-2", 3)]
    assert decoding_speed(model, prompts, 2, 400) > 0
    config = model.config
    heads, width = config.num_key_value_heads, config.head_dim
    assert cache_bytes(model) == 2 * config.num_hidden_layers * heads * width * 4
    monkeypatch.setattr(probe, "free_memory", lambda device: 100 * cache_bytes(model))
    with pytest.raises(MemoryError, match="2 rows of 400 tokens"):
        decoding_speed(model, prompts, 2, 400)
    assert free_memory(torch.device("meta")) is None
