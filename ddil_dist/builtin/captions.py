"""Captions for Fashion-MNIST: ten classes, their synonyms, and the phrases around them.

Every caption is a pure function of an index and a class, so that training data and evaluation prompts can be rebuilt
bit for bit. No caption names another class, and none is longer than 14 tokens of the built-in tokenizer. This module
needs nothing but the standard library.
"""

from __future__ import annotations

import hashlib

CLASS_NAMES: tuple[str, ...] = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
"""The dataset's ten classes in its own order, index 0 to 9."""

NOUNS: tuple[tuple[str, ...], ...] = (
    ("a t-shirt", "a t-shirt", "a tee", "a short-sleeved tee"),
    ("a pair of trousers", "trousers", "a pair of pants", "long trousers"),
    ("a pullover", "a pullover", "a sweater", "a knitted pullover"),
    ("a dress", "a dress", "a gown", "a long dress"),
    ("a coat", "a coat", "an overcoat", "a warm coat"),
    ("a sandal", "a sandal", "a strappy sandal", "an open sandal"),
    ("a shirt", "a shirt", "a button-up shirt", "a blouse"),
    ("a sneaker", "a sneaker", "a trainer", "a running shoe"),
    ("a bag", "a bag", "a handbag", "a purse"),
    ("an ankle boot", "an ankle boot", "a boot", "a high boot"),
)
"""What each class is called, with its article; repeated where a name should be more frequent."""

TEMPLATES: tuple[str, ...] = (
    "{}",
    "a photo of {}",
    "a picture of {}",
    "an image of {}",
    "a black-and-white photo of {}",
    "a black-and-white picture of {}",
    "a greyscale image of {}",
    "a monochrome photograph of {}",
    "a product photo of {}",
    "a catalogue picture of {}",
    "a studio shot of {}",
    "a small picture of {}",
    "a close-up of {}",
    "an online shop photo of {}",
    "a photo of {} on black",
    "{} on a black background",
    "{} for sale",
    "a fashion photo of {}",
)
"""Phrases that a noun is set into."""

EVALUATION_OFFSET = 1_000_000
"""Evaluation prompts are the captions of indices from here on; training images use 0 to 59,999."""


def _draw(index: int, class_index: int) -> int:
    """A uniform 64-bit integer that depends on nothing but the two arguments."""
    key = f"{index}/{class_index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def caption(index: int, class_index: int) -> str:
    """The caption of image `index` of class `class_index` (0 to 9): same arguments, same words, everywhere."""
    if not 0 <= class_index < len(NOUNS):
        raise ValueError(f"class_index is {class_index}; it must be 0 to {len(NOUNS) - 1}, one of {CLASS_NAMES}")
    template, noun = divmod(_draw(index, class_index) % (len(TEMPLATES) * len(NOUNS[0])), len(NOUNS[0]))
    return TEMPLATES[template].format(NOUNS[class_index][noun])


def evaluation_caption(line: int) -> tuple[str, int]:
    """The caption and the class index of evaluation prompt `line`; classes take turns, so any 10 k are balanced."""
    class_index = line % len(CLASS_NAMES)
    return caption(EVALUATION_OFFSET + line, class_index), class_index


def all_captions() -> list[str]:
    """Every caption there can be, without repeats, in a fixed order."""
    return list(dict.fromkeys(t.format(n) for t in TEMPLATES for nouns in NOUNS for n in nouns))
