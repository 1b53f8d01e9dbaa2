"""A small byte-pair tokenizer in CLIP's format: every word of the captions is one token, any other text still encodes.

The vocabulary is laid out as OpenAI's: 256 byte symbols, the same with the end-of-word mark, one entry a merge, start
and end of text. It pads with "!" (id 0), as Stable Diffusion 2 does, so that the end token is unique in a row: OpenCLIP
pools the text at the highest id.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MAX_TOKENS = 16
END_OF_WORD = "</w>"


def byte_symbols() -> list[str]:
    """The 256 printable characters that stand for bytes (GPT-2's table): printable ones stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(256 + k) for k in range(256 - len(printable))]


def learn_merges(captions: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016) until every word of the captions is one symbol.

    Merges the most frequent pair first; ties go to the pair that sorts first, so the result depends on nothing else.
    """
    counts = Counter(word for text in captions for word in re.findall(r"[a-z]+|[^\sa-z]+", text))
    words = {word: [*word[:-1], word[-1] + END_OF_WORD] for word in sorted(counts)}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in words.items():
            for pair in pairwise(symbols):
                pairs[pair] += counts[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for symbols in words.values():
            k = 0
            while k < len(symbols) - 1:
                if (symbols[k], symbols[k + 1]) == best:
                    symbols[k : k + 2] = ["".join(best)]
                k += 1


def build_tokenizer(captions: Sequence[str], out: Path) -> None:
    """Learn the merges and save a `CLIPTokenizer` to `out`."""
    from transformers import CLIPTokenizer

    merges = learn_merges(captions)
    symbols = byte_symbols()
    tokens = [*symbols, *(s + END_OF_WORD for s in symbols), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise AssertionError("two merges gave the same token")
    tokenizer = CLIPTokenizer(vocab, merges, pad_token=symbols[0], model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(str(out))
    # transformers 4 reads these two instead of tokenizer.json
    (out / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (out / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def encode(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> list[list[int]]:
    """Token ids of every caption, padded or cut to 16; each distinct caption is encoded once."""
    distinct = list(dict.fromkeys(captions))
    ids = tokenizer(distinct, padding="max_length", max_length=MAX_TOKENS, truncation=True).input_ids
    table = dict(zip(distinct, ids, strict=True))
    return [table[text] for text in captions]
