"""Shared by the runtime's tests: a tokenizer that fits the tiny models, texts for them, and the oracle's answer."""

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, LogitsProcessor, PreTrainedTokenizerFast

from hf_stepflow.runtime.modeling_stepflow import StepFlowModelForCausalLM
from hf_stepflow.runtime.settings import StepFlowSettings, resolve_layers
from hf_stepflow.runtime.step_detector import StepVocabulary
from hf_stepflow.runtime.trace import segment_trace
from tests.support.oracles import OracleSettings, OracleStepFlow, OracleTrace
from tests.support.tiny_models import tiny_model

QUESTION = "Ann has 4 eggs. Bob has three more."
TRACES = (
    QUESTION + "<think>\nBob has three more than Ann. So it is seven then.\n\nWait, check that again please. "
    "Yes it is right.</think>\n\nThe answer is 7.\n\nThat is all of it.",
    "How many?<think>First we count the red ones. Then we count all the blue ones.</think>Nine of them.",
    "Hi.<think>\n\n</think>\n\nHello there, friend.\n\nHow are you?",
    "A long question that goes on and on before anything is thought at all.<think>\nShort thinking here now. It is",
)
TWO_ROUNDS = (
    "First question.<think>Think about the first one. And once more about it.</think>One.<eos>"
    "Second question?<think>\nThink about the second one. Then again about it now. Ok.</think>Two it is.\n\nBye."
)


SHORT_TEXT = "Two eggs?<think>Add one. Then two.\n\nSo now.</think>Two.\n\nBye."


@lru_cache(maxsize=1)
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the markers: 261 tokens, pad 0, bos 1, eos 2, `<think>` 3, `</think>` 4."""
    vocabulary = {token: index for index, token in enumerate(("<pad>", "<bos>", "<eos>", "<think>", "</think>"))}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
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


def oracle_settings(model, settings: StepFlowSettings) -> OracleSettings:
    """Settings as the oracle takes them, resolved against a model with attention in all layers."""
    layers = list(range(model.config.get_text_config().num_hidden_layers))
    return OracleSettings(
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


def oracle_logits(model, ids: list[int], settings: StepFlowSettings, prompt_length: int | None = None) -> torch.Tensor:
    """Logits [T, V] of one unpadded row in float64, one token and head at a time."""
    trace = oracle_trace(ids, settings, prompt_length)
    return OracleStepFlow(model, oracle_settings(model, settings))(torch.tensor([ids]), trace)


def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits [2 T, V] of a row: those of a teacher-forced pass, then those of a token-by-token one."""
    with torch.no_grad():
        logits = [model(ids, use_cache=False).logits[0]]
        cache = DynamicCache(config=model.config)
        for slot in range(ids.shape[1]):
            logits.append(model(ids[:, slot : slot + 1], past_key_values=cache).logits[0])
    return torch.cat(logits)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm-wise relative error."""
    got, expected = got.double(), expected.double()
    return float((got - expected).norm() / expected.norm())


# Families with experts run in float64: near a tie, rounding sends a token to another expert.
FAMILIES = {
    "llama": torch.float32,
    "qwen2": torch.float32,
    "qwen3": torch.float32,
    "mistral": torch.float32,
    "gemma2": torch.float32,
    "gemma3_text": torch.float32,
    "phi3": torch.float32,
    "smollm3": torch.float32,
    "olmo2": torch.float32,
    "granite": torch.float32,
    "gpt_oss": torch.float64,
    "deepseek_v3": torch.float64,
}
# Those whose attention runs in one base implementation only. In float64 the eager kernel of deepseek_v3, with StepFlow
# or without, makes NaN of a query that sees no key: its softmax is in float32, where the mask's value is -inf.
IMPLEMENTATIONS = {"gemma2": "eager", "gpt_oss": "eager", "deepseek_v3": "sdpa"}

# Strong enough to show: untouched logits are 5 to 40 % away.
_STRONG = StepFlowSettings(min_step_chars=5, tau_max=0.4, alpha=0.5, oeb_layers="bottom:0.5", smi_layers="top:0.5")
VARIANTS = {
    "paper": _STRONG,
    "step": _STRONG.replace(bridge_scope="step", sink_tokens=2, smi_window=3),
    "absolute": _STRONG.replace(bridge_floor="absolute", oeb_span=4, tau_max=0.3),
    "heads": _STRONG.replace(oeb_heads={0: [0, 2], 1: [3]}, length_temperature=0.7, length_temperature_base=8),
    "temperature": _STRONG.replace(tau_max=0.0, alpha=0.0, length_temperature=0.7, length_temperature_base=8),
    "implicit": _STRONG.replace(implicit_thinking=True, summary_start="So:"),
}


def attach(model, settings: StepFlowSettings | str):
    """StepFlow on a model that fits the byte tokenizer; a text names a variant."""
    settings = VARIANTS[settings] if isinstance(settings, str) else settings
    return StepFlowModelForCausalLM.attach(model, settings, tokenizer=byte_tokenizer())


@cache
def attached(
    family: str, variant: str, implementation: str = "eager", dtype: torch.dtype | None = None, seed: int = 0
):
    """A tiny model of a family with StepFlow on it, one for the whole session; float64 casts its very weights."""
    model = tiny_model(family, dtype=FAMILIES[family], seed=seed).to(dtype or FAMILIES[family])
    model.set_attn_implementation(implementation)
    return attach(model, variant)


@cache
def reference_logits(
    family: str, variant: str, ids: tuple[int, ...], prompt_length: int | None = None
) -> torch.Tensor:
    """Logits [T, V] of one unpadded row in one float64 pass without cache; `test_reference` holds it to the oracle."""
    model = attached(family, variant, IMPLEMENTATIONS.get(family, "sdpa"), dtype=torch.float64)
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False, prompt_length=prompt_length).logits[0]


@dataclass
class Case:
    """A model and how to feed it."""

    family: str
    variant: str
    implementation: str

    @property
    def model(self):
        """The model, one for the whole session."""
        return attached(self.family, self.variant, self.implementation)

    @property
    def implicit(self) -> bool:
        """Whether thinking starts at the end of the prompt."""
        return VARIANTS[self.variant].implicit_thinking

    def text(self, text: str) -> str:
        """The text as the variant marks it."""
        return text.replace("<think>", " ").replace("</think>", " So:") if self.implicit else text

    def prompt_length(self, slots: int) -> dict[str, int]:
        """The argument that implicit thinking needs in a plain forward."""
        return {"prompt_length": slots} if self.implicit else {}


class Script(LogitsProcessor):
    """Leaves each row only the tokens that its script allows: a text, in which `~` stands for any of a few tokens.

    Rows that stem from one prompt (beams, samples) share its script; after a script's end anything goes.
    """

    WILD = "abcdef. "

    def __init__(self, width: int, texts: list[str]):
        self.width = width
        self.wild = encode(self.WILD)
        self.rows = [[self.wild if token == encode("~")[0] else [token] for token in encode(text)] for text in texts]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Forbids everything else."""
        allowed = torch.full_like(scores, float("-inf"))
        place = input_ids.shape[1] - self.width
        copies = max(1, scores.shape[0] // len(self.rows))
        for row in range(scores.shape[0]):
            script = self.rows[row // copies]
            allowed[row, script[place] if place < len(script) else slice(None)] = 0.0
        return scores + allowed
