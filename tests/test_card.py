"""The model card: what the hub and a person read of an exported student."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ddil_dist.card import model_card
from ddil_dist.config import load_config
from ddil_dist.metrics.protocol import PolicyResult, Protocol
from ddil_dist.metrics.results import Results


def front(card: str) -> dict[str, object]:
    _, matter, _ = card.split("---", 2)
    found = yaml.safe_load(matter)
    assert isinstance(found, dict)
    return found


def test_a_card_says_how_the_student_is_called_and_what_it_was_measured_by() -> None:
    config = load_config(None, ["teacher.pipeline=owner/name", "student.steps=4", "run.name=mine"])
    protocol = Protocol(
        sampler="DDIM", steps=4, nfes_per_image=4, guidance_scale=1.5, seed=7, num_images=500,
        feature_network="inception", resize="none", clip_model="ViT",
    )  # fmt: skip
    policy = PolicyResult(
        name="student, 4 steps", role="student", protocol=protocol, metrics={"fid": 2.5}, seconds_per_image=0.1
    )
    card = model_card(config, Results([policy]))
    assert front(card) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": "owner/name",
        "tags": ["diffusion-distillation", "few-step", "progressive"],
    }
    assert "num_inference_steps=4, guidance_scale=1.5" in card
    assert "progressive distillation, on states that the student itself reached, too (DDIL)" in card
    assert "`guidance_scale` 1 to 8" in card
    assert "| student, 4 steps | DDIM | 4 | 4 | 2.500 |" in card
    assert "500 images at guidance 1.5, seed 7; features by inception, resize: none, CLIP score by ViT" in card


@pytest.mark.parametrize("overrides", [["teacher.guidance={min: 3, max: 3}"], ["student.lora={rank: 2}"]])
def test_a_student_of_one_scale_is_said_to_be_that(overrides: list[str]) -> None:
    plain = "prior.parts=[{until: 1, forward: 1, student: 0, teacher: 0}]"
    card = model_card(load_config(None, [*overrides, plain]))
    assert "whatever `guidance_scale` it is called with" in card
    assert "DDIL" not in card
    assert "## Measured" not in card


def test_the_licence_is_the_teachers_where_its_card_names_one(tmp_path: Path) -> None:
    config = load_config(None, [f"teacher.pipeline={tmp_path}"])
    assert "license" not in front(model_card(config))
    (tmp_path / "README.md").write_text("---\nlicense: openrail++\n---\n# Name\n", encoding="utf-8")
    card = model_card(config)
    assert front(card)["license"] == "openrail++"
    assert f"`{tmp_path.name}`" in card
    assert str(tmp_path) not in card, "nobody else has that directory"
