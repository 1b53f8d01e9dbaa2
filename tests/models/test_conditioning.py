"""Encoded prompts: the pipeline's own encoding, in order, each prompt once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ddil_dist.models import conditioning as module
from ddil_dist.models.conditioning import Conditioning, PromptEncoder
from ddil_dist.problem import ImitationProblem
from tests.support.problem import CPU, tiny_problem


class CountingPipeline:
    """A pipeline that notes what it was asked to encode."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self.tokenizer = pipeline.tokenizer
        self.asked: list[list[str]] = []

    def encode_prompt(self, prompts: list[str], **options: Any) -> Any:
        self.asked.append(prompts)
        return self._pipeline.encode_prompt(prompts, **options)


@pytest.fixture(scope="module")
def problem(tiny_directory: Path) -> ImitationProblem:
    return tiny_problem(tiny_directory)


def test_rows_are_the_text_encoders_hidden_states_in_order(problem: ImitationProblem) -> None:
    prompts = ["a red square", "", "ein grünes Dreieck", "a red square"]
    encoded = problem.encoder.encode(prompts)
    pipeline = problem.teacher.pipeline
    for row, prompt in enumerate(prompts):
        tokens = pipeline.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        hidden = pipeline.text_encoder(tokens)[0]
        torch.testing.assert_close(encoded.embeddings[row], hidden[0], rtol=1e-4, atol=1e-5)
    assert not encoded.embeddings.requires_grad


def test_every_prompt_is_encoded_once(problem: ImitationProblem) -> None:
    pipeline = CountingPipeline(problem.teacher.pipeline)
    encoder = PromptEncoder(pipeline, CPU, torch.float32, image_size=16)
    first = encoder.encode(["a", "b", "a"])
    second = encoder.encode(["c", "b"])
    assert pipeline.asked == [["a", "b"], ["c"]]
    assert torch.equal(first.embeddings[0], first.embeddings[2])
    assert torch.equal(first.embeddings[1], second.embeddings[1])


def test_the_least_recently_used_prompt_is_forgotten(
    problem: ImitationProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CACHE_SIZE", 2)
    pipeline = CountingPipeline(problem.teacher.pipeline)
    encoder = PromptEncoder(pipeline, CPU, torch.float32, image_size=16)
    for prompts in (["a"], ["b"], ["a"], ["c"], ["a"], ["b"]):
        encoder.encode(prompts)
    assert pipeline.asked == [["a"], ["b"], ["c"], ["b"]]
    assert len(encoder.encode(["d", "e", "f", "g"])) == 4


def test_select_assign_expand_and_cat_move_whole_rows() -> None:
    rows = Conditioning(torch.arange(24.0).view(4, 2, 3))
    picked = rows.select(torch.tensor([3, 1]))
    assert torch.equal(picked.embeddings, rows.embeddings[[3, 1]])
    wide = Conditioning.cat([picked, rows.select(torch.tensor([0]))])
    assert torch.equal(wide.embeddings, rows.embeddings[[3, 1, 0]])
    assert torch.equal(picked.select(torch.tensor([0])).expand(3).embeddings, rows.embeddings[[3, 3, 3]])
    target = Conditioning(torch.zeros(4, 2, 3))
    target.assign(torch.tensor([2, 0]), picked)
    assert torch.equal(target.embeddings[[2, 0]], picked.embeddings)
    assert not target.embeddings[[1, 3]].any()


def test_prompts_that_are_cut_are_counted_and_not_shown(
    problem: ImitationProblem, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    encoder = PromptEncoder(problem.teacher.pipeline, CPU, torch.float32, image_size=16)
    long = [f"{'wordwordword ' * 30}{number}" for number in range(12)]
    encoder.encode(["short"])
    encoder.encode(long[:1])
    for prompt in long:
        encoder.encode([prompt])
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "1 of 2 prompts so far are longer than the text encoder's 16 tokens; what is beyond them it does not see",
        "10 of 11 prompts so far are longer than the text encoder's 16 tokens; what is beyond them it does not see",
    ]
    assert "wordword" not in "".join(capfd.readouterr())


def test_an_encoding_by_itself_does_not_depend_on_its_company(problem: ImitationProblem) -> None:
    pipeline = CountingPipeline(problem.teacher.pipeline)
    encoder = PromptEncoder(pipeline, CPU, torch.float32, image_size=16)
    encoder.one_by_one = True
    encoder.encode(["a", "b", "a"])
    assert pipeline.asked == [["a"], ["b"]]


def test_what_is_kept_is_there_for_every_stream(problem: ImitationProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = PromptEncoder(problem.teacher.pipeline, CPU, torch.float32, image_size=16)
    encoder.encode(["", "known"])
    rows = encoder.encode(["known"])
    kept: list[int] = []

    class Stream:
        def synchronize(self) -> None:
            kept.append(len(encoder._cache))

    monkeypatch.setattr(encoder, "_device", torch.device("cuda"))
    monkeypatch.setattr(encoder, "_encode", lambda prompts: rows)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    encoder.encode(["new"])
    encoder.encode(["new", "known"])
    assert kept == [2], "waited for once, before it was kept; what was known is there already"


def test_threads_that_share_an_encoder_do_not_encode_at_once(problem: ImitationProblem) -> None:
    inside, most = [0], [0]

    class Slow(CountingPipeline):
        def encode_prompt(self, prompts: list[str], **options: Any) -> Any:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            try:
                time.sleep(0.01)
                return super().encode_prompt(prompts, **options)
            finally:
                inside[0] -= 1

    encoder = PromptEncoder(Slow(problem.teacher.pipeline), CPU, torch.float32, image_size=16)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda number: encoder.encode([str(number % 3)]), range(12)))
    assert most == [1]
