"""Small tokenizers of the three kinds that models have, made on the spot."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "The early layers draft, and the later ones verify: nothing is computed twice.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))  # 3",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "草稿由前几层完成，验证由其余层完成。 😀👩‍🚀🏳️‍🌈 naïve café €5",
] * 4
END, START = "<|end|>", "<|start|>"


def _wrap(tokenizer: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, extra_special_tokens=[START])


def byte_level() -> Any:
    """As GPT-2, Llama 3, Qwen and SmolLM2 have it: a token is any bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=[END, START])
    )
    return _wrap(tokenizer)


def sentencepiece() -> Any:
    """As Llama 2 and Mistral have it: a space belongs to the word after it, what is rare comes as bytes."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator([text.encode("ascii", "ignore").decode() for text in TEXT],
                                trainers.BpeTrainer(vocab_size=150))  # fmt: skip
    vocabulary = [END, START, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(trained.get_vocab())]
    merges = json.loads(trained.to_str())["model"]["merges"]
    pairs = [tuple(merge) for merge in merges]
    table = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.BPE(table, pairs, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(END, special=True), AddedToken(START, special=True)])
    return _wrap(tokenizer)


def word_piece() -> Any:
    """As BERT has it: a token that continues a word is marked."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", END, START]))
    return _wrap(tokenizer)


KINDS = {"byte_level": byte_level, "sentencepiece": sentencepiece, "word_piece": word_piece}
