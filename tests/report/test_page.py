"""The whole page: self-contained, well-formed, complete, safe, and tolerant of a run at any stage."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ddil_dist.report import write_report
from ddil_dist.report.page import LINKS

from .synthetic_run import make_run

VOID = {"meta", "img", "br", "path", "use", "image", "rect"}


class Outline(HTMLParser):
    """Checks that every element is closed in order; collects ids, text and attributes that load something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.loads: list[str] = []
        self.tags: Counter[str] = Counter()
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids[value or ""] += 1
            if name in ("src", "href", "xlink:href"):
                self.loads.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return path.read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_loads_nothing(page: str) -> None:
    outline = Outline(page)
    assert [load for load in outline.loads if not load.startswith(("#", "data:image/"))] == []
    assert not re.search(r"@import|url\((?!#)", page)
    assert {name: n for name, n in outline.ids.items() if n > 1} == {}
    anchors = {load[1:] for load in outline.loads if load.startswith("#")}
    assert anchors <= set(outline.ids)
    assert {anchor for anchor, _ in LINKS} - {"critic"} <= set(outline.ids)


def test_the_headline_says_what_was_distilled_and_how_fast_it_is(page: str) -> None:
    text = Outline(page).text
    assert "A 4-step student of a 32-step teacher" in text
    assert "13.7×" in text  # noqa: RUF001
    assert "ahead of “forward data only, 4 steps” in 6 of 6 metrics" in text


def test_the_best_of_each_metric_is_marked(page: str) -> None:
    assert re.findall(r'<td class="best">([\d.]+)<', page) == [
        "2.531",
        "0.7302",
        "0.941",
        "0.0088",
        "0.962",
        "0.851",
    ]


def test_every_section_of_a_finished_run_has_its_content(page: str) -> None:
    assert 'class="missing"' not in page
    outline = Outline(page)
    for words in ("20 policy versions", "wanted by the prior", "bound, 200", "Live states by source",
                  "waiting for states", "1 pause is left out", "need 5 MiB of", "went on with 32 rows",
                  "rollout.actors=2", "builtin-classifier", "2.404 to 2.658",
                  "paired error, held out", "that of update 300: 0.0500, in student_best/",
                  "25% of the inserted states were never sampled", "Most: timestep 999 45%, actor-1 80%.",
                  "Drift", "update 200", "log scale"):  # fmt: skip
        assert words in outline.text
    assert outline.tags["figure"] == 24


def test_images_are_pixelated_and_inside_the_page(page: str) -> None:
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) == 45, "samples, and the training's"
    assert all('src="data:image/png;base64,' in image and 'class="tiny"' in image for image in images)


def test_prompts_cannot_inject_markup(page: str) -> None:
    assert "<b>on black</b>" not in page
    assert "a dress <b>on black</b>" in Outline(page).text


def test_skipped_rows_of_the_data_are_told_where_there_are_any(page: str, tmp_path: Path) -> None:
    assert "skipped" not in Outline(page).text
    (tmp_path / "events.jsonl").write_text(
        '{"kind": "skipped", "num_rows": 5000, "num_skipped": 3}\n'
        '{"kind": "skipped", "num_rows": 5000, "num_skipped": 12, "skipped": {"no caption": 12}}\n'
        '{"kind": "skipped", "num_rows": 5000, "num_skipped": 1}\n'  # resumed, and so far in its reading
    )
    found = Outline(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "12 of 5,000 rows of the data were skipped: 12 with no caption." in found


def test_a_password_in_a_url_stays_out_of_the_page(run_dir: Path, tmp_path: Path) -> None:
    text = (run_dir / "config.yaml").read_text().replace("url: null", "url: redis://:hunter2@host:6379/0")
    (tmp_path / "config.yaml").write_text(text)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "hunter2" not in page
    assert "redis://***@host:6379/0" in page


def test_a_run_that_has_left_nothing_has_a_page_that_says_so(tmp_path: Path) -> None:
    page = write_report(tmp_path).read_text(encoding="utf-8")
    Outline(page)
    assert page.count('class="missing"') == len(LINKS) - 1, "of a critic that was not trained there is no word"


@pytest.mark.parametrize("updates", [1, 2, 21])
def test_a_run_may_have_just_begun(tmp_path: Path, updates: int) -> None:
    Outline(write_report(make_run(tmp_path / "young", updates=updates)).read_text(encoding="utf-8"))


def test_kinds_and_keys_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "update", "update": 1}\n{"kind": "update", "update": 2, "loss": NaN, "sources": {}}\n'
        '{"kind": "publish", "version": 0}\n{"kind": "replay"}\n{"kind": "rollout"}\n{"kind": "rollout"}\n'
        '{"kind": "phase"}\n{"kind": "skipped"}\n{"kind": "skipped", "num_skipped": 3}\n'
        '{"kind": "applied", "version": 0, "actor": "<script>"}\n{"kind": "from the future"}\n'
    )
    page = write_report(tmp_path).read_text(encoding="utf-8")
    Outline(page)
    assert "<script>" not in page


def test_the_command_makes_the_report_and_names_what_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ddil_dist.report"]
    made = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == str(tmp_path / "report.html")
    failed = subprocess.run([*command, str(tmp_path / "no")], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert "is no directory" in failed.stderr


def test_neither_help_nor_the_report_imports_heavy_modules() -> None:
    script = (
        "import sys; import ddil_dist.report.__main__, ddil_dist.metrics.results, ddil_dist.metrics.table\n"
        "assert not {'matplotlib', 'numpy', 'torch'} & set(sys.modules)\n"
        "import ddil_dist.report.page\n"
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
