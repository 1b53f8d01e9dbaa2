"""A run's directory as a real run would leave it, invented: two actors, a resumption, four policies, 32x32 images.

`python -m tests.report.synthetic_run FOLDER` makes one and its report, for looking at.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddil_dist.analysis.results import (
    ANALYSIS_FILE,
    Analysis,
    Mixture,
    PointShift,
    ShiftResult,
    write_analysis,
)
from ddil_dist.config import dump_config, load_config
from ddil_dist.metrics.intervals import Interval
from ddil_dist.metrics.protocol import PolicyResult, Protocol, Role
from ddil_dist.metrics.results import Results, write_results
from ddil_dist.report import save_sample_rows, write_report

UPDATES = 400
BATCH = 64
START = 1_760_000_000.0
PAUSE_S = 4000
"""The run is stopped half way and resumed so much later."""
ACTORS = ("actor-0", "actor-1")
CAPTIONS = [
    "a coat", "a photo of trousers", "an image of an ankle boot", "a black-and-white photo of a strappy sandal",
    "a studio shot of a bag", "a dress <b>on black</b>", "a sneaker & co", "a pullover",
    "a shirt", "a t-shirt for sale",
]  # fmt: skip


def make_run(run_dir: Path, *, updates: int = UPDATES, seed: int = 0) -> Path:
    """Write every file of a finished run of `updates` updates and return its directory."""
    run_dir.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    config = load_config(
        None, [f"run.name={run_dir.name}", f"learner.updates={updates}", "rollout.actors=2", "replay.max_staleness=200"]
    )
    (run_dir / "config.yaml").write_text(dump_config(config))
    lines = [{"kind": "phase", "time": START, "name": "start-up", "seconds": 21.0}]
    lines += sorted(learner_lines(updates, rng) + actor_lines(updates, rng), key=lambda line: line["time"])
    end = lines[-1]["time"]
    for name, seconds in (("training", end - START - PAUSE_S), ("export", 3.1), ("evaluation", 62.0)):
        lines.append({"kind": "phase", "time": end, "name": name, "seconds": seconds})
    parts = ("weights", "gradients", "optimizer", "average", "activations")
    lines.append({"kind": "memory", "time": START} | {f"{part}_bytes": 2**20 for part in parts} | {"rows": BATCH})
    lines.append({"kind": "micro_batch", "time": START + 25, "update": 1, "rows": 32})
    for update in range(0, updates + 1, 100):
        lines.append({"kind": "look", "time": START + 30, "update": update, "latent_std": 1.1, "saturation": 1.3})
        value = 0.05 + abs(update - 300) / 10_000
        best = {"best_update": min(update, 300), "best_value": 0.05 + max(0, 300 - update) / 10_000}
        lines.append(
            {"kind": "held_out", "time": START + 30, "update": update, "metric": "paired_trajectory_error"}
            | {"value": value, "seconds": 0.4, **best}
        )
    kinds = ("update", "publish", "memory", "micro_batch", "look", "held_out")
    learner = [line for line in lines if line["kind"] in kinds]
    launcher = [line for line in lines if line not in learner]
    for name, part in (("metrics.jsonl", learner), ("events.jsonl", launcher)):
        (run_dir / name).write_text("".join(json.dumps(line) + "\n" for line in part))
    write_results(run_dir / "results.json", Results(policies(), {"export_max_abs_difference": 1.19e-7}))
    save_sample_rows(run_dir, sample_rows(rng), CAPTIONS)
    save_progress(run_dir / "progress")
    write_analysis(run_dir / ANALYSIS_FILE, analysis())
    return run_dir


def save_progress(directory: Path) -> None:
    """Pictures of three prompts after every hundredth update."""
    directory.mkdir(exist_ok=True)
    (directory / "captions.json").write_text(json.dumps(CAPTIONS[:3]))
    for update in range(0, UPDATES + 1, 100):
        shade = np.full((16, 48, 3), 255 * update // max(1, UPDATES), dtype=np.uint8)
        Image.fromarray(shade).save(directory / f"update_{update:08d}.png")


def analysis() -> Analysis:
    """Errors that grow towards the end of the path, and the two policies alone."""

    def about(value: float) -> Interval:
        return Interval(value, 0.9 * value, 1.1 * value)

    points = [
        PointShift(
            timestep=timestep,
            error_forward=about(0.02 / (index + 1)),
            error_teacher=about(0.021 / (index + 1)),
            error_visited=about(0.02 * ratio / (index + 1)),
            ratio=about(ratio),
            distance_visited=0.01 * index,
            distance_teacher=0.005 * index,
            distance_floor=0.0005,
            p_visited=0.002,
            p_teacher=0.002,
            final_error=about(0.05 / (index + 1)),
        )
        for index, (timestep, ratio) in enumerate(((999, 1.0), (749, 1.2), (500, 1.5), (250, 1.4)))
    ]
    mixtures = [
        Mixture(kind="alone", teacher=teacher, timestep=None, metrics={"fid": fid})
        for teacher, fid in ((1.0, 2.24), (0.0, 2.12))
    ]
    protocol = {"num_states": 256, "num_images": 500, "error": "of the next latents"}
    return Analysis(
        protocol=protocol, shift=ShiftResult(points=points, overall=Interval(1.4, 1.3, 1.5)), mixtures=mixtures
    )


def newest(update: int) -> int:
    return (update - 1) // 20 * 20


def learner_lines(updates: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """What the learner writes: updates, publications with what the actors made of them, replay statistics."""
    lines: list[dict[str, Any]] = []
    live = {"-1": 512, "0": 120}
    inserted, time = 900, START + 24
    for update in range(1, updates + 1):
        time += 0.9 + 0.4 * rng.random()
        time += PAUSE_S if update == updates // 2 else 0
        lines.append(update_line(update, updates, time, rng))
        if update % 20 == 1:
            lines += version_lines(update - 1, time, rng)
        if update % 5 == 0:
            live[str(newest(update))] = live.get(str(newest(update)), 0) + int(40 + 20 * rng.random())
            live["-1"] += 30
            inserted += 80
            lines.append(replay_line(time, live, num_inserted=inserted, num_sampled=update * BATCH))
    return lines


def update_line(update: int, updates: int, time: float, rng: np.random.Generator) -> dict[str, Any]:
    student = 0.1 if update <= 0.6 * updates else 0.4
    num_student = int(rng.binomial(BATCH, student))
    num_teacher = int(rng.binomial(BATCH - num_student, 0.5 / (1 - student) - student / (1 - student)))
    ages = np.minimum(rng.geometric(0.02, size=num_student + num_teacher // 3), min(newest(update) + 1, 200))
    made = (newest(update) - ages + 1).clip(0) // 20 * 20
    versions = {str(v): int((made == v).sum()) for v in np.unique(made)}
    loss = 0.25 * np.exp(-update / 120) + 0.05 + 0.02 * rng.random()
    wait, label, compute = 0.02 + 0.1 * rng.random(), 0.02, 0.7 + 0.1 * rng.random()
    return {
        "kind": "update",
        "time": time,
        "update": update,
        "total_updates": updates,
        "loss": loss,
        "loss_by_source": {"FORWARD": loss, "STUDENT": 1.3 * loss if num_student else None, "TEACHER": 0.9 * loss},
        "loss_by_timestep": {"999": loss * 2.5, "749": loss, "500": loss * 0.6, "250": loss * 0.3},
        "grad_norm": 0.4 + rng.gamma(2, 0.2),
        "learning_rate": 3e-4 * min(update / 20, 1 - (update - 20) / updates),
        "staleness_mean": float(ages.mean()) if len(ages) else 0.0,
        "staleness_max": int(ages.max(initial=0)),
        "sources": {"FORWARD": BATCH - num_student - num_teacher, "STUDENT": num_student, "TEACHER": num_teacher},
        "policy_versions": versions | {"-1": BATCH - len(made)},
        "wait_s": wait,
        "label_s": label,
        "compute_s": compute,
        "update_s": wait + label + compute + 0.05,
    }


def version_lines(version: int, time: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    seconds = 0.03 + 0.02 * rng.random()
    published = {"kind": "publish", "time": time, "version": version, "digest": "ab" * 16, "size_bytes": 7_340_032}
    applied = [
        {"kind": "applied", "time": time + 0.4 + 2 * rng.random(), "actor": actor, "version": version}
        for actor in ACTORS
    ]
    return [published | {"seconds": seconds}, *applied]


def replay_line(time: float, live: dict[str, int], *, num_inserted: int, num_sampled: int) -> dict[str, Any]:
    size = sum(live.values())
    part = size // 4
    return {
        "kind": "replay",
        "time": time,
        "size": size,
        "size_bytes": size * 2300,
        "num_inserted": num_inserted,
        "num_sampled": num_sampled,
        "by_source": {"FORWARD": size - 2 * part - part // 2, "STUDENT": part, "TEACHER": part + part // 2},
        "by_version": dict(live),
        "never_sampled": {
            "num": num_inserted // 4,
            "share": 0.25,
            "live": 30,
            "by_timestep": {str(t): {"inserted": 100, "num": 45 - 10 * n} for n, t in enumerate((999, 749, 500, 250))},
            "by_actor": {"actor-0": {"inserted": 300, "num": 20}, "actor-1": {"inserted": 100, "num": 80}},
        },
    }


def actor_lines(updates: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """What the rollout actors write, every ten seconds."""
    end = START + 24 + 1.1 * updates
    stop = START + 24 + 1.1 * updates / 2
    lines = []
    for actor in ACTORS:
        time = START + 12 + 3 * rng.random()
        while time < end:
            time += 10
            lines.append(
                {
                    "kind": "rollout",
                    "time": time + (PAUSE_S if time > stop else 0),
                    "actor": actor,
                    "states": int(180 + 40 * rng.random()),
                    "teacher_calls": 22,
                    "student_calls": 4,
                    "batch_fill": 0.9 + 0.1 * rng.random(),
                    "network_s": 6 + rng.random(),
                    "insert_wait_s": 2 * rng.random(),
                    "tick_s": 9.7,
                }
            )
    return lines


def policies() -> list[PolicyResult]:
    def policy(name: str, role: Role, steps: int, nfes: int, values: tuple[float, ...], seconds: float) -> PolicyResult:
        protocol = Protocol(
            sampler="DDIM", steps=steps, nfes_per_image=nfes, guidance_scale=3.0, seed=1234, num_images=500,
            feature_network="builtin-classifier", resize="none", clip_model="builtin-clip",
        )  # fmt: skip
        keys = ("fid", "clip_score", "agreement", "paired_trajectory_error", "density", "coverage")
        metrics = dict(zip(keys, values, strict=True))
        intervals = {key: (0.95 * value, 1.05 * value) for key, value in metrics.items()}
        return PolicyResult(
            name=name, role=role, protocol=protocol, metrics=metrics, intervals=intervals, seconds_per_image=seconds
        )

    return [
        policy("teacher, 32 steps", "teacher", 32, 64, (2.131, 0.7421, 0.952, 0.0, 0.991, 0.873), 0.0834),
        policy("student, 4 steps (DDIL)", "student", 4, 4, (2.531, 0.7302, 0.941, 0.0088, 0.962, 0.851), 0.0061),
        policy("forward data only, 4 steps", "baseline", 4, 4, (2.61, 0.7288, 0.938, 0.0095, 0.955, 0.846), 0.0061),
        policy("teacher in 4 steps", "baseline", 4, 8, (9.274, 0.6015, 0.71, 0.0911, 0.402, 0.322), 0.0113),
    ]


def sample_rows(rng: np.random.Generator) -> list[tuple[str, np.ndarray]]:
    y, x = np.mgrid[0:32, 0:32] / 31
    shapes = np.stack([np.exp(-((x - 0.5) ** 2) * (4 + 3 * i) - ((y - 0.5) ** 2) * (14 - i)) for i in range(10)])
    teacher = np.repeat(shapes[:, None], 3, axis=1)
    near = np.clip(teacher + 0.05 * rng.standard_normal(teacher.shape), 0, 1)
    far = np.clip(teacher * 0.6 + 0.2 * rng.standard_normal(teacher.shape), 0, 1)
    return [("teacher, 32 steps", teacher), ("student, 4 steps (DDIL)", near), ("teacher in 4 steps", far)]


if __name__ == "__main__":
    print(write_report(make_run(Path(sys.argv[1]))))
