"""Any pipelines by one protocol: sampled as their own call samples, resumed, compared, and refused in time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from PIL import Image
from rich.console import Console

from ddil_dist.errors import ConfigError, DataError
from ddil_dist.evaluate import main
from ddil_dist.evaluation import coco, pipelines
from ddil_dist.evaluation.choice import NetworkChoice
from ddil_dist.evaluation.coco import CocoCaptions
from ddil_dist.evaluation.networks import load_networks, with_reference
from ddil_dist.evaluation.pipelines import PipelineEvaluation, evaluate_pipelines
from ddil_dist.evaluation.samples import SampleFolder
from ddil_dist.evaluation.stock import Sampling, StockPipeline
from ddil_dist.metrics.evaluate import EvaluationNetworks
from ddil_dist.metrics.features import ClassifierFeatures
from ddil_dist.metrics.fid import GaussianStatistics, frechet_distance
from ddil_dist.metrics.results import read_results
from ddil_dist.sampling import seeded
from tests.support.problem import CPU

QUIET = Console(quiet=True)


class Means(torch.nn.Module):
    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))


@pytest.fixture
def request_of(tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PipelineEvaluation:
    """Four images of the tiny pipeline, measured by their mean colours."""
    networks = EvaluationNetworks(features=ClassifierFeatures(Means()))
    monkeypatch.setattr(pipelines, "load_networks", lambda choice, *, device: (networks, ["nothing else"]))
    return PipelineEvaluation(
        pipelines=[str(tiny_directory / "pipeline")],
        sampling=Sampling("own", 2, 3.0),
        num_images=4,
        seed=7,
        batch_size=3,
        precision="float32",
        networks=NetworkChoice(),
        data=str(tiny_directory / "data.parquet"),
        preset=None,
        prompts=None,
        out=tmp_path / "out",
    )


def test_images_are_the_pipelines_own_and_its_calls_are_counted(tiny_directory: Path) -> None:
    source = str(tiny_directory / "pipeline")
    ours = StockPipeline(source, Sampling("own", 3, 4.0), device=CPU, dtype=torch.float32)
    images, rows = ours(["a red square", "a blue circle"], [5, 6])
    stock = StableDiffusionPipeline.from_pretrained(source)
    stock.set_progress_bar_config(disable=True)
    theirs = stock(["a red square", "a blue circle"], num_inference_steps=3, guidance_scale=4.0,
                   generator=seeded([5, 6]), output_type="pt").images  # fmt: skip
    torch.testing.assert_close(images, theirs)
    assert rows == 2 * 2 * 3, "both branches of both images, at three steps"
    alone, _ = ours(["a blue circle"], [6])
    torch.testing.assert_close(alone[0], images[1], rtol=1e-3, atol=1e-3)


def test_the_sampler_is_what_was_asked_for(tiny_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(tiny_directory / "pipeline")

    def scheduler(sampler: Any) -> Any:
        return StockPipeline(source, Sampling(sampler, 2, 1.0), device=CPU, dtype=torch.float32)._pipeline.scheduler

    assert isinstance(scheduler("ddim"), DDIMScheduler)
    solver = scheduler("dpmsolver++")
    assert isinstance(solver, DPMSolverMultistepScheduler)
    assert (solver.config.solver_order, solver.config.algorithm_type) == (2, "dpmsolver++")
    load = StableDiffusionPipeline.from_pretrained

    def flow(*told: Any, **more: Any) -> Any:
        pipeline = load(source)
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
        return pipeline

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", flow)
    with pytest.raises(ConfigError, match=r"'ddim' is a sampler of diffusion.*use --sampler own"):
        scheduler("ddim")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="does not load"):
        StockPipeline(str(tiny_directory), Sampling("own", 2, 1.0), device=CPU, dtype=torch.float32)


def test_what_is_there_is_kept_and_what_is_missing_is_made(request_of: PipelineEvaluation) -> None:
    results = evaluate_pipelines(request_of, device=CPU, console=QUIET)
    (folder,) = (request_of.out / "samples").iterdir()
    files = sorted(folder.glob("*.png"))
    assert len(files) == 4
    kept = files[0].stat().st_mtime_ns
    first = files[2].read_bytes()
    files[2].unlink()
    again = evaluate_pipelines(request_of, device=CPU, console=QUIET)
    assert files[0].stat().st_mtime_ns == kept
    assert files[2].read_bytes() == first
    (one,), (other,) = results.policies, again.policies
    assert one.metrics == other.metrics
    assert one.protocol == other.protocol
    assert (one.protocol.nfes_per_image, one.protocol.steps, one.protocol.sampler) == (4, 2, "DDIM")
    assert read_results(request_of.out / "results.json").facts["not_measured"] == ["nothing else"]
    with pytest.raises(DataError, match=r"images of another protocol \(seed differ\)"):
        evaluate_pipelines(replace(request_of, seed=8), device=CPU, console=QUIET)


def test_fid_is_of_the_images_on_disk_against_the_real_ones(request_of: PipelineEvaluation) -> None:
    (policy,) = evaluate_pipelines(request_of, device=CPU, console=QUIET).policies
    (folder,) = (request_of.out / "samples").iterdir()
    made = np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))]) / 255
    real = torch.cat(list(pipelines._real(request_of, 16)))
    wanted = frechet_distance(
        GaussianStatistics.of(real.double().mean((2, 3))), GaussianStatistics.of(torch.from_numpy(made.mean((1, 2))))
    )
    assert policy.metrics["fid"] == pytest.approx(wanted, rel=1e-4, abs=1e-7)


def test_bad_input_is_refused_before_anything_is_sampled(request_of: PipelineEvaluation, tmp_path: Path) -> None:
    for changed, message in (
        (replace(request_of, num_images=10_000), r"--images: 10000, and there are \d+ captions"),
        (replace(request_of, sampling=Sampling("own", 0, 1.0)), "--steps: 0"),
        (replace(request_of, pipelines=["/a/x/student", "/b/x/student"]), "two end alike"),
        (replace(request_of, num_images=1), "--images: 1; metrics compare images"),
        (replace(request_of, preset="coco2017-5k", data=str(tmp_path)), r"needs .*captions_val2017\.json"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            evaluate_pipelines(changed, device=CPU, console=QUIET)
    assert not (request_of.out / "samples").exists()
    with pytest.raises(ConfigError, match="--inception: no file at"):
        load_networks(NetworkChoice(inception=tmp_path / "none.pth"), device=CPU)


def test_a_missing_network_is_said_with_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    networks, missing = load_networks(NetworkChoice(), device=CPU)
    assert networks == EvaluationNetworks(resize=networks.resize)
    assert [sentence.split(" ")[0] for sentence in missing] == ["FID,", "the", "HPSv2"]
    assert str(tmp_path / "hub" / "checkpoints") in missing[0]
    with pytest.raises(DataError, match="1 real images"):
        with_reference(EvaluationNetworks(features=ClassifierFeatures(Means())), [torch.rand(1, 3, 4, 4)])


def test_coco_has_one_caption_an_image_in_the_images_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco, "PRESETS", {"coco2017-5k": ("2017", 2), "coco2014-30k": ("2014", 30_000)})
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (12, 8), "red").save(tmp_path / "val2017" / name)
    told = {
        "images": [{"id": 9, "file_name": "b.jpg"}, {"id": 4, "file_name": "a.jpg"}],
        "annotations": [
            {"id": 3, "image_id": 9, "caption": "later"},
            {"id": 2, "image_id": 9, "caption": " first  of b "},
            {"id": 5, "image_id": 4, "caption": "of a"},
        ],
    }
    (tmp_path / "annotations" / "captions_val2017.json").write_text(json.dumps(told))
    found = CocoCaptions.open(tmp_path, "coco2017-5k")
    assert found.captions == ["of a", "first of b"]
    assert [file.name for file in found.files] == ["a.jpg", "b.jpg"]
    assert found.image(0, 8).shape == (3, 8, 8)
    assert float(found.image(0, 8)[0].mean()) == pytest.approx(1, abs=0.02)
    monkeypatch.setattr(coco, "PRESETS", {"coco2017-5k": ("2017", 3)})
    with pytest.raises(DataError, match="has captions of 2 images, the preset takes 3"):
        CocoCaptions.open(tmp_path, "coco2017-5k")


def test_two_pipelines_are_compared_pair_by_pair_by_the_command(
    tiny_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = EvaluationNetworks(features=ClassifierFeatures(Means()))
    monkeypatch.setattr(pipelines, "load_networks", lambda choice, *, device: (networks, []))
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_directory / "pipeline")
    pipeline.save_pretrained(tmp_path / "same")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a red square {number}" for number in range(20)))
    arguments = ["--pipelines", str(tiny_directory / "pipeline"), str(tmp_path / "same"), "--steps", "1", "--prompts",
                 str(prompts), "--data", str(tiny_directory / "data.parquet"),
                 "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(arguments) == 0
    differences = read_results(tmp_path / "out" / "results.json").facts["differences"]
    (found,) = differences.values()
    assert found["fid"] == [0.0, 0.0, 0.0], "the same images from the same noise"
    assert "fid +0 (+0 to +0)" in capsys.readouterr().out
    assert main([*arguments, "--images", "21"]) == 2
    assert "--images: 21, and there are 20 captions" in capsys.readouterr().err


def test_a_torn_image_is_named(tmp_path: Path) -> None:
    folder = SampleFolder(tmp_path, {"a": 1})
    folder.add([0], torch.rand(1, 3, 4, 4), seconds=1.0, rows=2)
    (tmp_path / "000000.png").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"000000\.png: does not decode .* delete it"):
        list(folder.batches(1, 1))


def test_diversity_is_of_more_images_of_the_first_captions(
    request_of: PipelineEvaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Apart:
        name = "mean colours"

        def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a - b).abs().mean((1, 2, 3))

    monkeypatch.setattr(pipelines, "load_distance", lambda choice, *, builtin, device: Apart())
    monkeypatch.setattr(pipelines, "NUM_PROMPTS", 2)
    monkeypatch.setattr(pipelines, "NUM_SEEDS", 3)
    (found,) = evaluate_pipelines(replace(request_of, diversity=True), device=CPU, console=QUIET).policies
    folder = request_of.out / "samples-diversity"
    files = sorted(folder.rglob("*.png"))
    assert len(files) == 2 * 3
    images = torch.stack([torch.from_numpy(np.asarray(Image.open(file), dtype=np.float32)) / 255 for file in files])
    pairs = [(x, y) for first in (0, 3) for x in range(first, first + 3) for y in range(x + 1, first + 3)]
    expected = float(np.mean([float((images[x] - images[y]).abs().mean()) for x, y in pairs]))
    assert found.metrics["lpips_diversity"] == pytest.approx(expected, rel=1e-4)
    assert found.protocol.diversity == "mean colours; 2 prompts, 3 images each"
    low, high = found.intervals["lpips_diversity"]
    assert low <= expected <= high


def test_diversity_without_its_network_is_refused_before_anything_is_sampled(request_of: PipelineEvaluation) -> None:
    with pytest.raises(ConfigError, match=r"^--diversity: LPIPS needs AlexNet's weights"):
        evaluate_pipelines(replace(request_of, diversity=True), device=CPU, console=QUIET)
    assert not request_of.out.exists()
