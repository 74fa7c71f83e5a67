"""Problems as token ids. The tokenizer has one token for each word, number or phrase, and bytes for everything else.

The phrases are what the model looks premises up by. In `Ben has 12 more than Ann.`, the tokens ` 12 more than` and
` Ann` directly follow tokens that hardly any other premise shares, so one induction head is enough. If every word were
a token, the keys would lie further back, and a model this small would learn to use them only by chance.
"""

from typing import Any

from hf_stepflow.prompts import encode_prompt, encode_response

from .levels import LARGEST, NAMES, RELATIONS, Problem

END = "<|end|>"
PAD = "<|pad|>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
THINK, END_OF_THINKING = "<think>", "</think>"
CONTROL_TOKENS = (PAD, END, USER, ASSISTANT, THINK, END_OF_THINKING)

WORDS = (
    *NAMES,
    *"Add How The What a add and answer are by counts do does done first from has have how in is it".split(),
    *"many more fewer needs next now of points so sum than the then there to".split(),
)  # fmt: skip
MARKS = (*"+-*=/", *".?,:;!")
# The words after a name, after a number, and before a number.
_VERBS = ("has", "counts")
_UNITS = ("points", *RELATIONS)
_PREPOSITIONS = ("from", "to", "by")
PHRASES = (
    *(f"{name} {verb}" for verb in _VERBS for name in NAMES),
    *(f"{number} {unit}" for unit in _UNITS for number in range(LARGEST + 1)),
    *(f"{preposition} {number}" for preposition in _PREPOSITIONS for number in range(LARGEST + 1)),
)

# Leaves room for the words of later problem families, so that they do not change the model's shape.
SIZE = 1280

# A blank belongs to the word after it; a number is split into two digits at a time.
_PIECES = (
    rf" (?:{'|'.join(NAMES)}) (?:{'|'.join(_VERBS)})\b| [0-9]{{1,2}} (?:{'|'.join(_UNITS)})\b"
    rf"| (?:{'|'.join(_PREPOSITIONS)}) [0-9]{{1,2}}\b"
    r"| ?[A-Za-z]+| ?[0-9]{1,2}| [^\sA-Za-z0-9]|[^\sA-Za-z0-9]+|\s+"
)

# With the blank after each marker, the first word of a text is the same token as elsewhere.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|><think>{{ message['content'] }}<|end|>"
    "{% else %}<|user|> {{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)


def build_tokenizer() -> Any:
    """Builds the tokenizer: byte-level, with words, two-digit numbers and phrases as whole tokens, and no merges."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = list(CONTROL_TOKENS)
    tokens += sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [f"Ġ{number}" for number in range(LARGEST + 1)]
    tokens += [f"Ġ{word}" for word in dict.fromkeys(WORDS)]
    tokens += [f"Ġ{mark}" for mark in MARKS]
    tokens += [f"Ġ{phrase.replace(' ', 'Ġ')}" for phrase in PHRASES]
    tokens += [f"<|reserved_{number}|>" for number in range(SIZE - len(tokens))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # ignore_merges: a piece in the vocabulary is one token, and any other is split into bytes.
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS[2:]],
        model_max_length=8192,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode_problem(tokenizer: Any, problem: Problem) -> tuple[list[int], list[int]]:
    """Encodes the prompt and the one right response of a problem.

    Example:
        >>> from hf_stepflow import load_reasoner
        >>> from hf_stepflow.reasoner.levels import problems_of
        >>> from hf_stepflow.reasoner.prompts import encode_problem
        >>> _, tokenizer = load_reasoner()
        >>> prompt, response = encode_problem(tokenizer, problems_of("chains-4", "test", 1)[0])
    """
    return encode_prompt(tokenizer, problem.question), encode_response(tokenizer, problem.response)
