"""Tokenizers for the tests of the step detector, built on the spot: every way of writing text into a vocabulary."""

import json
import random
from collections.abc import Iterable
from functools import lru_cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

KINDS = ("byte_level", "metaspace", "wordpiece", "words")
# Kinds that keep line breaks.
EXACT_KINDS = ("byte_level", "metaspace")


def _byte_alphabet() -> list[str]:
    """How byte-level BPE writes each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    written = {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    return [written[byte] for byte in range(0x100)]


BYTE_ALPHABET = _byte_alphabet()


def spelled(piece: bytes) -> str:
    """A piece as byte-level BPE writes it."""
    return "".join(BYTE_ALPHABET[byte] for byte in piece)


def byte_level_tokenizer(
    pieces: Iterable[bytes] = (), special: Iterable[str] = (), added: Iterable[str] = (), eos: str = "<eos>"
) -> PreTrainedTokenizerFast:
    """A tokenizer with these pieces beside the 256 bytes (ids 0 to 255); it encodes text byte by byte.

    Args:
        pieces: the bytes of further tokens.
        special: added tokens that are special.
        added: added tokens that are not.
        eos: the end-of-sequence token, special too.
    """
    vocabulary = {character: byte for byte, character in enumerate(BYTE_ALPHABET)}
    for piece in pieces:
        vocabulary.setdefault(spelled(piece), len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, clean_up_tokenization_spaces=False)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    return tokenizer


def ids_of(tokenizer: PreTrainedTokenizerFast, pieces: Iterable[bytes | str]) -> list[int]:
    """Ids of pieces (bytes) and added tokens (text) of a byte-level tokenizer."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[piece if isinstance(piece, str) else spelled(piece)] for piece in pieces]


def trained_tokenizer(kind: str, corpus: list[str], markers: tuple[str, ...] = ("<think>", "</think>")):
    """A tokenizer of one of `KINDS`, trained on a few sentences, with some added tokens."""
    if kind == "byte_level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(corpus, trainer)
    elif kind == "metaspace":
        backend = _metaspace(corpus)
    elif kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=False)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(prefix="##")
        trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=["[UNK]"], show_progress=False)
        backend.train_from_iterator(corpus, trainer)
    else:
        backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False)
        backend.train_from_iterator(corpus, trainer)
    unknown = {} if kind == "byte_level" else {"unk_token": "<unk>" if kind == "metaspace" else "[UNK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", **unknown)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in markers])
    return tokenizer


def _metaspace(corpus: list[str]) -> Tokenizer:
    """SentencePiece as Llama has it: a mark for spaces, and bytes for what the vocabulary lacks."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    lines = [line for text in corpus for line in text.split("\n") if line.isascii()]
    learner.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    model = json.loads(learner.to_str())["model"]
    texts = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(model["vocab"], key=model["vocab"].get)]
    vocabulary = {text: index for index, text in enumerate(texts)}
    merges = [tuple(pair) for pair in model["merges"]]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    replace = decoders.Replace("\u2581", " ")
    backend.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return backend


@lru_cache(maxsize=1)
def large_tokenizer(size: int = 150_000) -> PreTrainedTokenizerFast:
    """A byte-level vocabulary of the size and mix of a current model's: words, CJK, code punctuation, digits."""
    chooser = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk" * 3 + "qjxz"
    marks = ".,;:!?()[]{}<>-_=*/\\\"'`#$%&|"

    def piece() -> str:
        share = chooser.random()
        if share < 0.68:
            word = "".join(chooser.choices(letters, k=chooser.randint(2, 10)))
            word = word.capitalize() if chooser.random() < 0.3 else word
            return (" " if chooser.random() < 0.6 else "") + word
        if share < 0.88:
            return "".join(chr(chooser.randint(0x4E00, 0x9FFF)) for _ in range(chooser.randint(1, 4)))
        if share < 0.95:
            run = chooser.choice(marks) * chooser.randint(1, 16)
            mixed = "".join(chooser.choices(marks, k=chooser.randint(2, 4)))
            ending = chooser.choice(("", "", "\n", "\n\n", " "))
            return chooser.choice(("", " ")) + chooser.choice((run, mixed)) + ending
        return str(chooser.randint(0, 9999)) + chooser.choice(("", "", ".", ")"))

    pieces: set[bytes] = set()
    while len(pieces) < size - 300:
        pieces.add(piece().encode())
    return byte_level_tokenizer(sorted(pieces), special=["<think>", "</think>"])
