"""Compiled decode: one graph a token, whatever the token does, and the same logits."""

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from transformers import CompileConfig, StaticCache

from tests.support.flow import IMPLEMENTATIONS, VARIANTS, Script, attached, batch, encode, error, reference_logits

PROMPT = "Two eggs?<think>"
SCRIPT = "Add one. Then two.\n\nSo now.</think>Two.\n\nBye."
TOLERANCE = 1e-5
GRAPHS: list[torch.fx.GraphModule] = []


def counted(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
    """A backend that counts what it is given and runs it as it is."""
    GRAPHS.append(graph)
    return graph


def counted_ahead_of_time(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
    """A backend that traces through autograd and functionalisation, as inductor does."""
    GRAPHS.append(graph)
    return aot_eager(graph, inputs)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    GRAPHS.clear()
    yield
    torch._dynamo.reset()


def model_of(family: str, variant: str):
    model = attached(family, variant, IMPLEMENTATIONS.get(family, "sdpa"))
    if family in ("gpt_oss", "deepseek_v3"):
        model.set_experts_implementation("batched_mm")  # the eager loop over experts cannot be one graph
    return model


@pytest.mark.parametrize(
    "whole", [pytest.param(True, id="call", marks=pytest.mark.slow), pytest.param(False, id="forward")]
)
@pytest.mark.parametrize(
    ("family", "variant"),
    [
        ("llama", "paper"),
        pytest.param("llama", "heads", marks=pytest.mark.slow),
        pytest.param("qwen3", "implicit", marks=pytest.mark.slow),
        pytest.param("gemma2", "absolute", marks=pytest.mark.slow),
        pytest.param("gemma3_text", "step", marks=pytest.mark.slow),
        pytest.param("gpt_oss", "step", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "temperature", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_decode(family: str, variant: str, whole: bool) -> None:
    """`torch.compile(model)`, and the idiom `model.forward = torch.compile(model.forward)`."""
    model = model_of(family, variant)
    ids = encode(PROMPT + SCRIPT)
    prompt_length = 15 if VARIANTS[variant].implicit_thinking else None
    cache = StaticCache(config=model.config, max_cache_len=64)
    logits = [model(torch.tensor([ids[:13]]), past_key_values=cache, prompt_length=prompt_length).logits[0]]
    if whole:
        run = torch.compile(model, backend=counted, fullgraph=True)
    else:
        run = model
        model.forward = torch.compile(model.forward, backend=counted, fullgraph=True)
    numbers = []
    try:
        for slot, token in enumerate(ids[13:], 13):
            positions = torch.tensor([[slot]])
            logits.append(run(torch.tensor([[token]]), past_key_values=cache, position_ids=positions).logits[0])
            numbers.append(len(GRAPHS))
    finally:
        model.__dict__.pop("forward", None)
    expected = reference_logits(family, variant, tuple(ids), prompt_length)
    assert error(torch.cat(logits), expected) <= TOLERANCE
    # The labels and the model make one graph, or one each. A cache with a window counts in a Python integer: the graph
    # is made anew once for the integer to become a symbol, and once when the window has filled up.
    windows = getattr(model.config, "sliding_window", None) is not None
    assert 1 <= numbers[0] <= 2
    assert numbers[5] == numbers[-1] <= numbers[0] + 2 * windows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "variant"),
    [("llama", "step"), ("gemma3_text", "paper"), ("gpt_oss", "absolute"), ("deepseek_v3", "implicit")],
)
@torch.no_grad()
def test_generate(family: str, variant: str) -> None:
    """`generate` with a static cache compiles by itself; here with a ragged batch."""
    model = model_of(family, variant)
    texts = (PROMPT, "A longer prompt, so?<think>Hm. It is")
    if VARIANTS[variant].implicit_thinking:
        texts = tuple(text.replace("<think>", " ") for text in texts)
    ids, mask = batch(list(texts))
    width = ids.shape[1]
    config = CompileConfig(backend=counted_ahead_of_time, fullgraph=True, mode=None)
    config._compile_all_devices = True
    output = model.generate(
        ids,
        attention_mask=mask,
        logits_processor=[Script(width, [SCRIPT, " so. And on.</think>Well.\n\nThe end of it is"])],
        max_new_tokens=len(encode(SCRIPT)),
        do_sample=False,
        cache_implementation="static",
        compile_config=config,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert 1 <= len(GRAPHS) <= 3
    for row, sequence in enumerate(output.sequences.tolist()):
        pad = width - int(mask[row].sum())
        prompt_length = width - pad if VARIANTS[variant].implicit_thinking else None
        expected = reference_logits(family, variant, tuple(sequence[pad:-1]), prompt_length)
        got = torch.stack([step[row] for step in output.logits])
        assert error(got, expected[width - pad - 1 :]) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("family", "variant"), [("llama", "paper"), ("gemma3_text", "step")])
@torch.no_grad()
def test_compiled_prompt(family: str, variant: str) -> None:
    """A compiled prefill breaks its graph once, to label the prompt on the host."""
    model = model_of(family, variant)
    ids = encode(PROMPT + SCRIPT)
    cache = StaticCache(config=model.config, max_cache_len=64)
    run = torch.compile(model, backend=counted)
    logits = [run(torch.tensor([ids[:30]]), past_key_values=cache).logits[0]]
    logits += [run(torch.tensor([[token]]), past_key_values=cache).logits[0] for token in ids[30:]]
    assert error(torch.cat(logits), reference_logits(family, variant, tuple(ids))) <= TOLERANCE
