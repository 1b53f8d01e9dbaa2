"""The benchmark at full size: its networks are the published ones, and all of it runs when they are tiny."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from accelerate.state import AcceleratorState

from tests.benchmarks.full_size import learner
from tests.benchmarks.full_size.__main__ import main, peak_flops
from tests.benchmarks.full_size.models import SIZES, TINY, flops_per_image


@pytest.fixture(autouse=True)
def _own_state() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    verbosity = diffusers.utils.logging.get_verbosity()
    yield
    diffusers.utils.logging.set_verbosity(verbosity)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(("name", "parameters"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
def test_the_networks_have_as_many_parameters_as_the_published_ones(name: str, parameters: int) -> None:
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(SIZES[name].unet)
    assert sum(parameter.numel() for parameter in unet.parameters()) == parameters


def test_operations_of_an_image_are_those_of_a_forward_and_a_backward_pass() -> None:
    """An SD 1.5 U-Net's forward pass is 0.80 TFLOP at 64x64; the backward pass of a product is two."""
    assert flops_per_image(SIZES["sd15"]) == pytest.approx(3 * 0.80e12, rel=0.02)


@pytest.mark.parametrize(
    ("device", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("Tesla T4", None),
    ],
)
def test_peaks_go_by_the_devices_name(device: str, teraflops: float | None) -> None:
    assert peak_flops(device) == (None if teraflops is None else teraflops * 1e12)


def rows_of(printed: str) -> list[list[str]]:
    """The cells of all tables' rows."""
    lines = [line for line in printed.splitlines() if line.startswith(("| yes |", "| no |", "| teacher", "| student"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.filterwarnings("default")
def test_all_of_it_runs_tiny(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--tiny", "--no-compile", "--updates", "1"])
    rows = rows_of(capsys.readouterr().out)
    assert [row[:2] for row in rows] == [["no", "no"], ["yes", "no"], ["teacher, guided", "no"], ["student", "no"]] * 2
    assert all(float(row[2]) > 0 for row in rows)
    assert {row[5] for row in rows if len(row) > 3} == {str(TINY["sd15"].rows)}


@pytest.mark.filterwarnings("default")
def test_a_variant_without_memory_is_a_row(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    measured = learner._measure

    def narrow(model: Any, variant: learner.Variant, *arguments: Any, **options: Any) -> learner.Updates:
        if not variant.gradient_checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return measured(model, variant, *arguments, **options)

    monkeypatch.setattr(learner, "_measure", narrow)
    main(["sd15", "--tiny", "--no-compile", "--updates", "1"])
    without, checkpointed, *_ = rows_of(capsys.readouterr().out)
    assert without[2] == "out of memory"
    assert float(checkpointed[2]) > 0


def test_without_a_gpu_full_size_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["sd15"])
    assert "need a GPU" in capsys.readouterr().err
