"""One meaning, many routes: every way of running a model gives the logits of the method's definition."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.support.flow import (
    FAMILIES,
    IMPLEMENTATIONS,
    VARIANTS,
    Case,
    Script,
    attached,
    batch,
    byte_tokenizer,
    encode,
    error,
    oracle_logits,
    reference_logits,
)
from tests.support.tiny_models import tiny_model

TOLERANCE = 1e-5

# Prompts and what is forced after them: the rows of a batch stand in different phases, and some reach their end.
PROMPTS = ("Two eggs?<think>", "Why?<think>Hm, so it is. And", "A longer one here?", "Q<think>Yes sure. No.</think>Fi")
SCRIPTS = (
    "Add one. Then two.\n\nSo now.</think>Two.\n\nBye.",
    " then on. Well on.</think>Ok.<eos>",
    "<think>\nStart now. Go on. The end.</think>Done it.",
    "ne.\n\nThat is all.",
)
WILD_SCRIPT = "A~~~. Th~~ ~wo.\n\nSo ~~w.</think>T~o.\n\nB~e."


@dataclass
class Heard:
    """Logits [n, V] that a row's tokens got from position `start` on."""

    ids: list[int]
    start: int
    logits: torch.Tensor
    prompt_length: int | None = None


Mode = Callable[[Case], Iterator[Heard]]
MODES: dict[str, Mode] = {}


def mode(run: Mode) -> Mode:
    MODES[run.__name__] = run
    return run


def row(case: Case, index: int = 0) -> tuple[list[int], int]:
    """Ids of a prompt with its script, and the prompt's length."""
    prompt = encode(case.text(PROMPTS[index]))
    return prompt + encode(case.text(SCRIPTS[index])), len(prompt)


@mode
def teacher_forcing(case: Case) -> Iterator[Heard]:
    ids, length = row(case)
    yield Heard(ids, 0, case.model(torch.tensor([ids]), **case.prompt_length(length)).logits[0], length)


def in_pieces(case: Case, sizes: list[int], cache: Any = None) -> Iterator[Heard]:
    """A row fed in pieces of the given sizes; the last one is repeated."""
    ids, length = row(case)
    logits, start = [], 0
    while start < len(ids):
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        piece = torch.tensor([ids[start : start + size]])
        output = case.model(piece, past_key_values=cache, use_cache=True, **case.prompt_length(length))
        cache = output.past_key_values
        logits.append(output.logits[0])
        start += size
    yield Heard(ids, 0, torch.cat(logits), length)


@mode
def token_by_token(case: Case) -> Iterator[Heard]:
    yield from in_pieces(case, [1])


@mode
def chunks(case: Case) -> Iterator[Heard]:
    yield from in_pieces(case, [7, 5, 1, 19, 3])


@mode
def static_cache_by_hand(case: Case) -> Iterator[Heard]:
    yield from in_pieces(case, [20, 1], StaticCache(config=case.model.config, max_cache_len=80))


@mode
def crop(case: Case) -> Iterator[Heard]:
    ids, length = row(case)
    cache = DynamicCache(config=case.model.config)
    if hasattr(cache, "activate_past_recording"):
        cache.activate_past_recording()
    elif any(cache.is_sliding):
        pytest.skip("this release of transformers cannot roll sliding windows back")
    case.model(torch.tensor([ids[:30]]), past_key_values=cache, **case.prompt_length(length))
    case.model(torch.tensor([encode("x. Wrong. No")]), past_key_values=cache, **case.prompt_length(length))
    cache.crop(-14)
    piece = torch.tensor([ids[28:]])
    yield Heard(ids, 28, case.model(piece, past_key_values=cache, **case.prompt_length(length)).logits[0], length)


def padded(case: Case, side: str) -> Iterator[Heard]:
    rows = [row(case, index)[0] for index in range(4)]
    ids, mask = batch([byte_tokenizer().decode(each) for each in rows], side)
    logits = case.model(ids, attention_mask=mask, **case.prompt_length(25)).logits
    for index, each in enumerate(rows):
        pad = ids.shape[1] - len(each)
        first = pad if side == "left" else 0
        yield Heard(each, 0, logits[index, first : first + len(each)], 25 - first)


@mode
def left_padded(case: Case) -> Iterator[Heard]:
    yield from padded(case, "left")


@mode
def positional_arguments(case: Case) -> Iterator[Heard]:
    """The mask as second argument and the cache in a tuple; then a mask that is longer than the tokens."""
    ids, length = row(case)
    tokens = torch.tensor([[0, 0, *ids]])
    mask = (torch.arange(tokens.shape[1]) > 1).long()[None]
    arguments = case.prompt_length(length + 2)
    logits, cache = case.model(tokens[:, :30], mask[:, :30], use_cache=True, return_dict=False, **arguments)[:2]
    rest = case.model(tokens[:, 30:], mask, None, cache, return_dict=False, **arguments)[0]
    yield Heard(ids, 0, torch.cat((logits, rest), 1)[0, 2:], length)

    static = StaticCache(config=case.model.config, max_cache_len=80)
    made, end = [], 0
    for part in (torch.tensor([ids[:30]]), *torch.tensor(ids[30:])[:, None, None]):
        end += part.shape[1]
        seen = (torch.arange(80) < end).long()[None]
        made.append(case.model(part, seen, None, static, **case.prompt_length(length)).logits[0])
    yield Heard(ids, 0, torch.cat(made), length)


@mode
def right_padded(case: Case) -> Iterator[Heard]:
    yield from padded(case, "right")


def generate(case: Case, texts: list[str], scripts: list[str], **options: Any) -> tuple[Any, torch.Tensor]:
    """Generates along scripts; gives the output and the mask of the prompts."""
    ids, mask = batch([case.text(text) for text in texts])
    script = Script(ids.shape[1], [case.text(text) for text in scripts])
    output = case.model.generate(
        ids,
        attention_mask=mask,
        logits_processor=[script],
        max_new_tokens=max(map(len, script.rows)),
        **{"do_sample": False, "output_logits": True, "return_dict_in_generate": True} | options,
    )
    return output, mask


def heard(output: Any, mask: torch.Tensor) -> Iterator[Heard]:
    """What the rows of a generation got at each step, up to their end."""
    width = mask.shape[1]
    copies = output.sequences.shape[0] // mask.shape[0]
    for index, sequence in enumerate(output.sequences.tolist()):
        pad = width - int(mask[index // copies].sum())
        made = sequence[width:]
        steps = min(made.index(2) + 1 if 2 in made else len(made), len(output.logits))
        sources = [index] * steps
        if output.get("beam_indices") is not None:
            sources = output.beam_indices[index, :steps].tolist()
        logits = torch.stack([output.logits[step][source] for step, source in enumerate(sources)])
        yield Heard(sequence[pad : width + steps - 1], width - pad - 1, logits, width - pad)


@mode
def greedy_batch(case: Case) -> Iterator[Heard]:
    yield from heard(*generate(case, PROMPTS, SCRIPTS))


@mode
def prefill_in_chunks(case: Case) -> Iterator[Heard]:
    yield from heard(*generate(case, PROMPTS[1:2], SCRIPTS[1:2], prefill_chunk_size=8))


@mode
def no_cache(case: Case) -> Iterator[Heard]:
    yield from heard(*generate(case, PROMPTS[:2], SCRIPTS[:2], use_cache=False))


@mode
def static_cache(case: Case) -> Iterator[Heard]:
    yield from heard(*generate(case, PROMPTS, SCRIPTS, cache_implementation="static", disable_compile=True))


@mode
def beams(case: Case) -> Iterator[Heard]:
    output, mask = generate(case, PROMPTS[:2], [WILD_SCRIPT] * 2, num_beams=3, num_return_sequences=3)
    assert any(len({*sources} - {-1}) > 1 for sources in output.beam_indices.tolist()), "no beam changed its place"
    yield from heard(output, mask)


@mode
def samples(case: Case) -> Iterator[Heard]:
    output, mask = generate(case, PROMPTS[:2], [WILD_SCRIPT] * 2, do_sample=True, num_return_sequences=3)
    assert len({tuple(made) for made in output.sequences.tolist()}) == 6
    yield from heard(output, mask)


@mode
def wide_batch(case: Case) -> Iterator[Heard]:
    ids = range(36)  # more rows than are labelled on the host
    output, mask = generate(case, [PROMPTS[index % 4] for index in ids], [SCRIPTS[index % 4] for index in ids])
    yield from list(heard(output, mask))[-5:]


def speculated(case: Case, script: str, **options: Any) -> Iterator[Heard]:
    """A generation with drafts, of which some must be taken and some refused."""
    lengths: list[int] = []
    handle = case.model.get_output_embeddings().register_forward_pre_hook(
        lambda _module, args: lengths.append(args[0].shape[1])
    )
    try:
        output, mask = generate(case, PROMPTS[:1], [script], **options)
    finally:
        handle.remove()
    made = output.sequences.shape[1] - mask.shape[1]
    assert len(lengths) < made < sum(lengths)
    yield from heard(output, mask)


@mode
def prompt_lookup(case: Case) -> Iterator[Heard]:
    yield from speculated(case, "Two ~~~~. Tw~ ~~~~~~~~. Two.</think>Two ~~~~. Two.", prompt_lookup_num_tokens=4)


@mode
def plain_assistant(case: Case) -> Iterator[Heard]:
    yield from speculated(case, WILD_SCRIPT, assistant_model=tiny_model("llama", seed=1))


@mode
def assistant_with_stepflow(case: Case) -> Iterator[Heard]:
    yield from speculated(case, WILD_SCRIPT, assistant_model=attached("qwen2", "paper", seed=1))


@mode
def early_exit(case: Case) -> Iterator[Heard]:
    yield from heard(*generate(case, PROMPTS[:1], [WILD_SCRIPT], assistant_early_exit=3))


@mode
def second_turn(case: Case) -> Iterator[Heard]:
    first, mask = generate(case, ["One?<think>"], ["Think of it. Once more.</think>One.<eos>"])
    yield from heard(first, mask)
    question = encode("Two?<think>")
    ids = torch.cat((first.sequences, torch.tensor([question])), 1)
    script = Script(ids.shape[1], ["\nThink again. Then on now. Ok.</think>Two.\n\nBye."])
    second = case.model.generate(
        ids,
        past_key_values=first.past_key_values,
        logits_processor=[script],
        max_new_tokens=len(script.rows[0]),
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    yield from heard(second, torch.ones_like(ids))


@mode
def cached_without_stepflow(case: Case) -> Iterator[Heard]:
    """What is cached without ids (a prefix of virtual tokens, turns before StepFlow was attached) is question."""
    ids, _ = row(case)
    cache = DynamicCache(config=case.model.config)
    with case.model.disable_stepflow():
        case.model(torch.tensor([ids[:5]]), past_key_values=cache)
    logits = [case.model(torch.tensor([ids[5:30]]), past_key_values=cache).logits[0]]
    logits += [case.model(torch.tensor([[token]]), past_key_values=cache).logits[0] for token in ids[30:]]
    yield Heard(ids, 5, torch.cat(logits))


@mode
def copied_prompt_cache(case: Case) -> Iterator[Heard]:
    ids, length = row(case)
    arguments = case.prompt_length(length)
    prompt = case.model(torch.tensor([ids[:24]]), use_cache=True, **arguments).past_key_values
    for script in (SCRIPTS[0], SCRIPTS[2]):
        cache = copy.deepcopy(prompt)
        text = encode(case.text(script))
        logits = case.model(torch.tensor([text[:20]]), past_key_values=cache, **arguments).logits[0]
        rest = case.model(torch.tensor([text[20:]]), past_key_values=cache, **arguments).logits[0]
        yield Heard(ids[:24] + text, 24, torch.cat((logits, rest)), length)


def cell(family_number: int, mode_number: int) -> Any:
    """One cell of the matrix: the settings and kernels rotate; a cross-section runs in every test run."""
    family, name = list(FAMILIES)[family_number], list(MODES)[mode_number]
    variant = list(VARIANTS)[(family_number + mode_number // 3) % len(VARIANTS)]
    if variant == "implicit" and name in ("second_turn", "cached_without_stepflow"):
        variant = "absolute"  # without markers, these need the length of more than one prompt
    implementation = IMPLEMENTATIONS.get(family, ("eager", "sdpa")[mode_number % 2])
    share = {"gpt_oss": 1, "gemma3_text": 1, "gemma2": 2, "deepseek_v3": 2}.get(family, 4)
    slow = [] if (family_number + mode_number) % share == 0 else [pytest.mark.slow]
    return pytest.param(name, Case(family, variant, implementation), marks=slow, id=f"{name}-{family}-{variant}")


# The base model itself cannot leave gpt_oss early: its cache and its layers disagree on how many there are.
CELLS = [
    cell(family_number, mode_number)
    for family_number, family in enumerate(FAMILIES)
    for mode_number, name in enumerate(MODES)
    if (family, name) != ("gpt_oss", "early_exit")
]


@pytest.mark.parametrize(("name", "case"), CELLS)
@torch.no_grad()
def test_mode(name: str, case: Case) -> None:
    count = 0
    for made in MODES[name](case):
        expected = reference_logits(
            case.family, case.variant, tuple(made.ids), made.prompt_length if case.implicit else None
        )[made.start :]
        assert made.logits.shape == expected.shape
        worst = max(error(got, want) for got, want in zip(made.logits, expected, strict=True))
        assert worst <= TOLERANCE
        count += 1
    assert count


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        pytest.param(family, variant, marks=[] if (i - j) % len(VARIANTS) == 0 else [pytest.mark.slow])
        for i, family in enumerate(FAMILIES)
        for j, variant in enumerate(VARIANTS)
    ],
)
@torch.no_grad()
def test_reference(family: str, variant: str) -> None:
    """What the modes are compared with is the definition, and is not what the base model gives."""
    case = Case(family, variant, IMPLEMENTATIONS.get(family, "sdpa"))
    ids, length = row(case)
    prompt_length = length if case.implicit else None
    reference = reference_logits(family, variant, tuple(ids), prompt_length)
    with case.model.disable_stepflow():
        plain = case.model(torch.tensor([ids])).logits[0]
    expected = oracle_logits(tiny_model(family, dtype=FAMILIES[family]), ids, VARIANTS[variant], prompt_length)
    assert error(reference, expected) <= 1e-6
    assert error(plain, expected) > 0.01


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.parametrize("name", ["teacher_forcing", "token_by_token", "chunks", "left_padded", "greedy_batch"])
@pytest.mark.parametrize(
    ("family", "variant"), [("llama", "step"), pytest.param("gemma3_text", "heads", marks=pytest.mark.slow)]
)
def test_flex_attention(name: str, family: str, variant: str) -> None:
    with torch.compiler.set_stance("force_eager"):
        test_mode(name, Case(family, variant, "flex_attention"))


@pytest.mark.parametrize(
    ("family", "variant"), [("llama", "paper"), ("gemma3_text", "step"), ("gpt_oss", "absolute"), ("gemma2", "heads")]
)
@torch.no_grad()
def test_reference_of_two_rounds(family: str, variant: str) -> None:
    ids = encode("One?<think>Think it. Again.</think>One.<eos>Two?<think>\nIt is two. Then on.</think>Two.\n\nBye.")
    expected = oracle_logits(tiny_model(family, dtype=FAMILIES[family]), ids, VARIANTS[variant])
    assert error(reference_logits(family, variant, tuple(ids)), expected) <= 1e-6
