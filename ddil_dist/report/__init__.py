"""The report of a run: one HTML page with everything inside it, made from the files of the run's directory alone.

`write_report` may be called at any time, also while the run goes on, as may `python -m ddil_dist.report runs/demo`:
what is not there yet has a line that says so. `save_sample_rows` writes the images that the page shows.

`record` and `samples` read the directory, `series` computes, `charts` and `html` draw, `headline`, `learning`, `system`
and `appendix` each hold the sections of one topic, `page` puts them together. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["REPORT_FILE", "save_sample_rows", "write_report"]

REPORT_FILE = "report.html"


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` and return its path; raises EnvironmentFailure if `run_dir` is no directory."""
    from ddil_dist.report.page import render_page
    from ddil_dist.report.record import read_run

    path = run_dir / REPORT_FILE
    page = render_page(read_run(run_dir))
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def save_sample_rows(run_dir: Path, rows: Sequence[tuple[str, Any]], captions: Sequence[str]) -> Path:
    """Write the images that the report shows; `ddil_dist.report.samples.save_sample_rows` has the details."""
    from ddil_dist.report import samples

    return samples.save_sample_rows(run_dir, rows, captions)
