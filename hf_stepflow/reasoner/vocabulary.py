"""The reasoner's tokenizer: a token a word or number of its problems, bytes for everything else, nothing ever lost."""

from typing import Any

from .chains import RELATIONS
from .holdings import COLOURS
from .problems import LARGEST, NAMES

END = "<|end|>"
PAD = "<|pad|>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
THINK, END_OF_THINKING = "<think>", "</think>"
CONTROL_TOKENS = (PAD, END, USER, ASSISTANT, THINK, END_OF_THINKING)

WORDS = (
    *NAMES, *COLOURS, *RELATIONS,
    *"Add How The What a add and answer are by coins counts do does done first from has have how in is it".split(),
    *"many more needs next now of points so sum than the then there to".split(),
)  # fmt: skip
MARKS = (*"+-*=/", *".?,:;!")

# Room for words of later problem families, so that they do not change the model's shape.
SIZE = 512

# A blank belongs to the word that follows it; a number is read two digits at a time.
_PIECES = r" ?[A-Za-z]+| ?[0-9]{1,2}| [^\sA-Za-z0-9]|[^\sA-Za-z0-9]+|\s+"

# The blank after each marker makes the first word of a text the token that it is anywhere else.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|><think>{{ message['content'] }}<|end|>"
    "{% else %}<|user|> {{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)


def build_tokenizer() -> Any:
    """The tokenizer: byte-level, with words and two-digit numbers as tokens of their own and no merges."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = list(CONTROL_TOKENS)
    tokens += sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [f"Ġ{number}" for number in range(LARGEST + 1)]
    tokens += [f"Ġ{word}" for word in dict.fromkeys(WORDS)]
    tokens += [f"Ġ{mark}" for mark in MARKS]
    tokens += [f"<|reserved_{number}|>" for number in range(SIZE - len(tokens))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # ignore_merges: a piece that is in the vocabulary is taken whole, any other byte by byte.
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
