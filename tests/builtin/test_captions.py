"""Captions: fixed words for fixed arguments, balanced prompts, and a tokenizer that takes them all."""

import pytest
from transformers import CLIPTokenizer

from ddil_dist.builtin import CLASS_NAMES, PIPELINE_DIR, caption, evaluation_prompts
from ddil_dist.builtin.captions import NOUNS, all_captions, evaluation_caption
from ddil_dist.builtin.training.tokenizer import byte_symbols, encode, learn_merges
from ddil_dist.errors import ConfigError


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(PIPELINE_DIR / "tokenizer")


def test_a_caption_depends_on_its_arguments_alone() -> None:
    assert caption(0, 9) == caption(0, 9)
    assert [evaluation_caption(line)[0] for line in (0, 1, 7)] == [
        "a close-up of a t-shirt",
        "a studio shot of trousers",
        "a sneaker on a black background",
    ]


def test_an_unknown_class_is_refused_with_the_range() -> None:
    with pytest.raises(ValueError, match="class_index is 10; it must be 0 to 9"):
        caption(0, 10)


def test_no_phrase_is_shared_by_two_classes() -> None:
    nouns = [noun for nouns in NOUNS for noun in set(nouns)]
    assert len(nouns) == len(set(nouns))


def test_shipped_prompts_are_those_of_the_code_and_balanced() -> None:
    prompts = evaluation_prompts(1000)
    assert prompts == [evaluation_caption(line) for line in range(1000)]
    assert [sum(c == k for _, c in prompts) for k in range(len(CLASS_NAMES))] == [100] * 10
    with pytest.raises(ConfigError, match="has 1000 evaluation prompts: set 1000 or less"):
        evaluation_prompts(1001)


def test_every_caption_fits_and_comes_back(tokenizer: CLIPTokenizer) -> None:
    captions = all_captions()
    rows = encode(tokenizer, captions)
    assert {len(row) for row in rows} == {tokenizer.model_max_length} == {16}
    assert all(tokenizer.eos_token_id in row for row in rows), "a caption was cut"
    plain = [text for text in captions if "-" not in text]  # decoding puts spaces around hyphens
    assert tokenizer.batch_decode([tokenizer(t).input_ids for t in plain], skip_special_tokens=True) == plain


def test_every_word_of_the_captions_is_one_token(tokenizer: CLIPTokenizer) -> None:
    words = {word for text in all_captions() for word in text.replace("-", " ").split()}
    assert {word: len(tokenizer(word).input_ids) - 2 for word in words} == dict.fromkeys(words, 1)


def test_any_other_text_still_encodes_without_unknowns(tokenizer: CLIPTokenizer) -> None:
    text = "zebra ünïcode 漢字 #42"
    ids = tokenizer(text).input_ids[1:-1]
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_learn_merges_joins_the_most_frequent_pair_first() -> None:
    assert learn_merges(["ab ab cab"]) == [("a", "b</w>"), ("c", "ab</w>")]


def test_byte_symbols_cover_every_byte_once() -> None:
    assert len(set(byte_symbols())) == 256
    assert byte_symbols()[0] == "!"
