"""Shared by the runtime's tests: a tokenizer that fits the tiny models, traces to feed them, and the oracle's answer."""

from functools import lru_cache

import torch
from oracles import OracleSettings, OracleStepFlow, OracleTrace
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_stepflow.runtime.configuration_stepflow import StepFlowSettings, resolve_layers
from hf_stepflow.runtime.steps import StepVocabulary
from hf_stepflow.runtime.token_text import _BYTE_OF_CHARACTER
from hf_stepflow.runtime.trace import segment_trace

QUESTION = "Ann has 4 eggs. Bob has three more."
TRACES = (
    QUESTION + "<think>\nBob has three more than Ann. So it is seven then.\n\nWait, check that again please. "
    "Yes it is right.</think>\n\nThe answer is 7.\n\nThat is all of it.",
    "How many?<think>First we count the red ones. Then we count all the blue ones.</think>Nine of them.",
    "Hi.<think>\n\n</think>\n\nHello there, friend.\n\nHow are you?",
    "A long question that goes on and on before anything is thought at all.<think>\nShort thinking here now. Done it is",
)
TWO_ROUNDS = (
    "First question.<think>Think about the first one. And once more about it.</think>One.<eos>"
    "Second question?<think>\nThink about the second one. Then again about it now. Ok.</think>Two it is.\n\nBye."
)


@lru_cache(maxsize=1)
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the markers: 261 tokens, pad 0, bos 1, eos 2, `<think>` 3, `</think>` 4."""
    vocabulary = {token: index for index, token in enumerate(("<pad>", "<bos>", "<eos>", "<think>", "</think>"))}
    for character in sorted(_BYTE_OF_CHARACTER):
        vocabulary[character] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<think>", "</think>"],
        clean_up_tokenization_spaces=False,
    )


def encode(text: str) -> list[int]:
    """Token ids of a text, markers included."""
    return byte_tokenizer().encode(text, add_special_tokens=False)


def batch(texts: list[str], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Padded ids and mask, both [B, T]."""
    rows = [encode(text) for text in texts]
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    if side == "left":
        ids = [pad + row for pad, row in zip(pads, rows, strict=True)]
        mask = [pad + [1] * len(row) for pad, row in zip(pads, rows, strict=True)]
    else:
        ids = [row + pad for pad, row in zip(pads, rows, strict=True)]
        mask = [[1] * len(row) + pad for pad, row in zip(pads, rows, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def oracle_trace(ids: list[int], settings: StepFlowSettings, prompt_length: int | None = None) -> OracleTrace:
    """The oracle's view of a trace."""
    tokenizer = byte_tokenizer()
    vocabulary = StepVocabulary.from_tokenizer(tokenizer, settings)
    trace = segment_trace(tokenizer, ids, vocabulary, prompt_length)
    assert trace.round_ids is not None
    control = [token in tokenizer.all_special_ids for token in ids]
    return OracleTrace(trace.segment_ids.tolist(), trace.round_ids.tolist(), trace.step_ids.tolist(), control)


def oracle_logits(model, ids: list[int], settings: StepFlowSettings, prompt_length: int | None = None) -> torch.Tensor:
    """Logits [T, V] of one unpadded row in float64, one token and head at a time."""
    layers = list(range(model.config.get_text_config().num_hidden_layers))
    oracle = OracleSettings(
        tau_max=settings.tau_max,
        alpha=settings.alpha,
        oeb_layers=resolve_layers("oeb_layers", settings.oeb_layers, layers),
        smi_layers=resolve_layers("smi_layers", settings.smi_layers, layers),
        bridge_scope=settings.bridge_scope,
        bridge_floor=settings.bridge_floor,
        sink_tokens=settings.sink_tokens,
        oeb_span=settings.oeb_span,
        oeb_heads=settings.oeb_heads,
        smi_window=settings.smi_window,
        length_temperature=settings.length_temperature,
        length_temperature_base=settings.length_temperature_base,
        length_temperature_layers=resolve_layers("", settings.length_temperature_layers, layers),
        length_temperature_heads=settings.length_temperature_heads,
    )
    trace = oracle_trace(ids, settings, prompt_length)
    return OracleStepFlow(model, oracle)(torch.tensor([ids]), trace)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm-wise relative error."""
    got, expected = got.double(), expected.double()
    return float((got - expected).norm() / expected.norm())
