"""The built-in recipes' losses at a fixed seed are what they were: what is rebuilt around a method does not change it.

Each recipe runs inline on the built-in pipeline, a few updates of a small batch. A change that means to move a loss
moves the recorded values in the same commit, and says so; `python -m tests.test_recipe_losses` prints the new ones.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from ddil_dist.config import load_config
from ddil_dist.launch.inline import run_inline

RUNS = Path(__file__).parents[1] / "deploy" / "runs"
TOLERANCE = 1e-3
"""Relative, for other processors and other releases of torch; on one machine the values repeat bit for bit."""
SMALL = (
    "run.execution=inline",
    "learner.updates=4",
    "learner.batch_size=6",
    "learner.publish_every=2",
    "learner.sample_every=0",
    "rollout.batch_size=6",
    "rollout.student_batch_size=2",
    "rollout.insert_batch=4",
    "replay.min_size=8",
    "replay.samples_per_insert=2.0",
    "replay.error_buffer=16.0",
)
"""Both parts of a prior, three versions of the student, and states of every kind, in about a second."""
FORWARD = "prior.parts=[{until: 1.0, forward: 1.0, student: 0.0, teacher: 0.0}]"
CASES: dict[str, tuple[str, ...]] = {
    "builtin_pd": (),
    "builtin_pd, labels by the learner": ("rollout.labels=learner",),
    "builtin_pd_backward": (),
    "builtin_pd_forward, guidance": ("objective.type=guidance", "student.steps=32"),
    "builtin_pd_forward, velocity": (
        "objective.type=velocity", "student.steps=32", "teacher.guidance={min: 1.0, max: 1.0}",
    ),
    "builtin_lcm": (),
    "builtin_lcm_lora": (),
    "builtin_dmd": (),
    "builtin_dmd2": ("objective.generator_every=2",),
    "builtin_dmd2, backward simulation": (
        "objective.generator_every=2", "objective.generator_input=backward_simulation", FORWARD,
    ),
}  # fmt: skip
"""A recipe, and after the comma what is special here: the overrides."""
LOSSES: dict[str, list[dict[str, float]]] = {
    "builtin_pd": [
        {"student": 0.65417},
        {"student": 0.206056},
        {"student": 0.195865},
        {"student": 0.246619},
    ],
    "builtin_pd, labels by the learner": [
        {"student": 0.214946},
        {"student": 1.7814},
        {"student": 1.36421},
        {"student": 0.415427},
    ],
    "builtin_pd_backward": [
        {"student": 1.26598},
        {"student": 1.85037},
        {"student": 0.542451},
        {"student": 0.463866},
    ],
    "builtin_pd_forward, guidance": [
        {"student": 0.111495},
        {"student": 0.060447},
        {"student": 0.121646},
        {"student": 0.11118},
    ],
    "builtin_pd_forward, velocity": [
        {"student": 0.888009},
        {"student": 0.815221},
        {"student": 0.63788},
        {"student": 0.695843},
    ],
    "builtin_lcm": [
        {"student": 0.0313186},
        {"student": 0.235742},
        {"student": 0.343577},
        {"student": 0.230128},
    ],
    "builtin_lcm_lora": [
        {"student": 0.0297196},
        {"student": 0.0358792},
        {"student": 0.0615559},
        {"student": 0.0309098},
    ],
    "builtin_dmd": [
        {"student": 0.11848, "fake_score": 0.147415},
        {"student": 0.103939, "fake_score": 0.0936797},
        {"student": 0.105855, "fake_score": 0.277695},
        {"student": 0.150914, "fake_score": 0.761562},
    ],
    "builtin_dmd2": [
        {"student": 0.00821024, "fake_score": 0.217499},
        {"fake_score": 0.306944},
        {"student": 0.0744982, "fake_score": 0.184572},
        {"fake_score": 0.134788},
    ],
    "builtin_dmd2, backward simulation": [
        {"student": 0.0741877, "fake_score": 0.270978},
        {"fake_score": 0.143472},
        {"student": 0.0773909, "fake_score": 0.0912668},
        {"fake_score": 0.0913718},
    ],
}


def losses(case: str, directory: Path) -> list[dict[str, float]]:
    """By network, of every update of a small run."""
    recipe = case.split(",", maxsplit=1)[0]
    config = load_config(RUNS / f"{recipe}.yaml", [*SMALL, *CASES[case], f"run.directory={directory}"])
    assert run_inline(config)
    lines = map(json.loads, (config.run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["losses"] for line in lines if line["kind"] == "update"]


@pytest.mark.parametrize("case", CASES)
def test_a_recipe_s_losses_are_those_recorded(case: str, tmp_path: Path) -> None:
    found = losses(case, tmp_path)
    assert [update.keys() for update in found] == [update.keys() for update in LOSSES[case]]
    for update, expected in zip(found, LOSSES[case], strict=True):
        assert update == pytest.approx(expected, rel=TOLERANCE)


if __name__ == "__main__":
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            rows = [{network: float(f"{loss:.6g}") for network, loss in update.items()} for update in
                    losses(name, Path(folder))]  # fmt: skip
        print(f'    "{name}": [', *(f"        {row},".replace("'", '"') for row in rows), "    ],", sep="\n")
