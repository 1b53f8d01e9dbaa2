"""The one command, end to end, with trainings of two updates: every stage runs, resumes and is skipped."""

from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from ddil_dist.builtin.build import STAGES, main
from ddil_dist.builtin.training import classifier, clip, dataset, measure, unet, vae


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not dataset.DEBIAN_DIR.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_one_command_builds_everything_and_does_nothing_the_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_split = dataset.load_split

    def load_some(data_dir: Path, name: str) -> dataset.Split:
        split = load_split(data_dir, name)
        return dataset.Split(split.images[:2000], split.labels[:2000])

    monkeypatch.setattr(dataset, "load_split", load_some)
    monkeypatch.setattr(classifier, "NUM_REFERENCE_FEATURES", 100)
    for module in (classifier, clip, unet, vae):
        monkeypatch.setattr(module, "PLAN", replace(module.PLAN, updates=2))
    monkeypatch.setattr(vae, "DECODER_PLAN", replace(vae.DECODER_PLAN, updates=2))
    monkeypatch.setattr(measure, "NUM_SAMPLES", 100)
    monkeypatch.setattr(measure, "MANY_STEPS", 2)
    monkeypatch.setattr(dataset.write_parquet, "__kwdefaults__", {"num": 100})
    argv = ["--out", str(tmp_path / "assets"), "--work", str(tmp_path / "work")]

    main(argv)
    built = capsys.readouterr().out
    assert [line.split(":")[0] for line in built.splitlines() if line.endswith(" s")] == list(STAGES)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "assets" / "pipeline")
    assert pipeline("a bag", num_inference_steps=1, output_type="pt").images.shape == (1, 3, 32, 32)
    assert (tmp_path / "assets" / "MODEL_CARD.md").read_text().count("| 2 | 1 |") == 1

    main(argv)
    assert capsys.readouterr().out.splitlines() == [f"{stage}: done already" for stage in STAGES]
