"""Data read a window of files at a time: order, resume, what is held, and what is damaged or away."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddil_dist.config import DataConfig, load_config
from ddil_dist.data import windows as module
from ddil_dist.data.forward import ForwardData
from ddil_dist.data.windows import WindowedRows, Windows
from ddil_dist.errors import ConfigError, DataError
from ddil_dist.launch.__main__ import main
from tests.data.support import encoded, write_rows
from tests.data.test_places import shard
from tests.support.problem import tiny_problem

SIZES = (4, 5, 3, 6, 4, 4, 2)
"""Rows of the shards."""


class Pixels:
    """In place of a teacher: an image's mean is its latent."""

    def image_posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean = images.mean((1, 2, 3)).view(-1, 1, 1, 1)
        return mean, torch.zeros_like(mean)

    def draw_latents(self, mean: Tensor, std: Tensor, generator: torch.Generator) -> Tensor:
        return mean + 0 * torch.randn(mean.shape, generator=generator)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    directory = tmp_path / "shards"
    directory.mkdir()
    for number, size in enumerate(SIZES):
        (directory / f"{number:05d}.tar").write_bytes(shard(*(f"{number}/{row}" for row in range(size))))
    return directory


class Server(http.server.ThreadingHTTPServer):
    failures = 0
    """Requests that are refused before one is answered again."""
    asked: list[str]


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            assert isinstance(self.server, Server)
            self.server.asked.append(self.path)
            if self.server.failures:
                self.server.failures -= 1
                self.send_error(503)
                return
            super().do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    with Server(("127.0.0.1", 0), partial(Handler, directory=str(shards))) as running:
        running.asked = []
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def remote(server: Server, tmp_path: Path, **changes: Any) -> DataConfig:
    path = f"http://127.0.0.1:{server.server_port}/{{00000..00006}}.tar"
    return DataConfig(path=path, window=2, download=tmp_path / "download", **changes)


def stream(config: DataConfig, *, seed: int = 5) -> ForwardData:
    windows = Windows(config, image_size=8, seed=0)
    teacher: Any = Pixels()
    return ForwardData(WindowedRows(windows, teacher, seed=seed), teacher, seed=seed, encode_batch=4)


def held(tmp_path: Path) -> int:
    """Shards on the disk."""
    return len(list((tmp_path / "download").rglob("*.tar")))


def test_a_window_s_rows_come_together_and_an_epoch_has_every_shard(shards: Path) -> None:
    config = DataConfig(path=str(shards), window=2)
    windows = Windows(config, image_size=8, seed=0)
    assert windows.per_epoch == 4
    for epoch in (0, 1):
        files = [windows.files(4 * epoch + place, seed=5) for place in range(4)]
        assert [len(window) for window in files] == [2, 2, 2, 1]
        assert sorted(file for window in files for file in window) == sorted(shards.glob("*.tar"))
    assert windows.files(0, seed=5) != windows.files(4, seed=5)
    _, captions = stream(config).next(4 * windows.num_rows)
    for number in range(4):
        mine = captions[number * windows.num_rows : (number + 1) * windows.num_rows]
        names = {
            f"{int(file.stem)}/{row}" for file in windows.files(number, seed=5) for row in range(SIZES[int(file.stem)])
        }
        assert set(mine) <= names
        counts = [mine.count(name) for name in names]
        assert max(counts) - min(counts) <= 1, "a small window gives its rows about equally often"


def test_the_order_is_the_seed_s_whoever_reads(shards: Path, server: Server, tmp_path: Path) -> None:
    at_home = stream(DataConfig(path=str(shards), window=2)).next(50)[1]
    assert stream(remote(server, tmp_path)).next(50)[1] == at_home
    assert stream(DataConfig(path=str(shards), window=2), seed=6).next(50)[1] != at_home


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 60))
def test_a_resumed_reader_goes_on_wherever_it_was_killed(shards: Path, position: int) -> None:
    config = DataConfig(path=str(shards), window=2)
    whole = stream(config).next(70)[1]
    before = stream(config)
    assert before.next(position)[1] == whole[:position] if position else True
    after = stream(config)
    after.load_state_dict(before.state_dict())
    assert after.next(70 - position)[1] == whole[position:]
    captions_only = stream(config)
    captions_only.load_state_dict(before.state_dict())
    assert captions_only.next_captions(70 - position) == whole[position:]


def test_reading_begins_with_the_first_window_and_holds_three_at_most(server: Server, tmp_path: Path) -> None:
    forward = stream(remote(server, tmp_path))
    forward.next(1)
    assert len(set(server.asked)) <= 6, "the run's first window, this reader's first, and its next"
    most = 0
    for _ in range(40):
        forward.next(2)
        most = max(most, held(tmp_path))
    assert most <= 2 * 4  # the run's first, this one, the next, and the one that is just being let go


def test_what_was_fetched_goes_with_its_reader(server: Server, tmp_path: Path) -> None:
    forward = stream(remote(server, tmp_path))
    forward.next(20)
    rows = forward._rows
    assert isinstance(rows, WindowedRows)
    rows._pool.shutdown(wait=True)
    assert held(tmp_path) > 0
    del forward, rows
    assert held(tmp_path) == 0


def test_windows_of_a_killed_process_are_removed(server: Server, tmp_path: Path) -> None:
    config = remote(server, tmp_path)
    name = module._own_name()
    alive, dead = (tmp_path / "download" / one for one in (name, name.replace(name.rsplit("-", 2)[1], "4194305")))
    for directory in (alive, dead):
        directory.mkdir(parents=True)
    Windows(config, image_size=8, seed=0)
    assert alive.exists()
    assert not dead.exists()


def test_a_storage_that_is_away_for_a_moment_costs_nothing(
    shards: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    forward = stream(remote(server, tmp_path))
    forward.next(4)
    server.failures = 2
    assert forward.next(40)[1] == stream(DataConfig(path=str(shards), window=2)).next(44)[1][4:]
    server.failures = 10**6
    with pytest.raises(DataError, match=r"data.path: .*\.tar' cannot be fetched: "):
        forward.next(60)


def test_a_window_that_could_not_be_fetched_ahead_is_fetched_when_it_is_needed(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    forward = stream(remote(server, tmp_path))
    rows = forward._rows
    assert isinstance(rows, WindowedRows)
    server.failures = 10**6
    with pytest.raises(DataError):
        forward.next(1)  # the first of all cannot be had at all
    server.failures = 0
    forward.next(1)
    assert rows._next is not None
    assert rows._next.exception() is None
    server.failures = 10**6
    rows._next = rows._pool.submit(rows._open, rows._number + 1)
    assert isinstance(rows._next.exception(), DataError)
    server.failures = 0
    assert len(forward.next(30)[1]) == 30


def test_a_damaged_shard_is_passed_over_told_and_counted(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = (shards / "00003.tar").read_bytes()
    (shards / "00003.tar").write_bytes(whole[:522])
    forward = stream(DataConfig(path=str(shards), window=2))
    captions = forward.next(60)[1]
    assert {caption.split("/")[0] for caption in captions} == {"0", "1", "2", "4", "5", "6"}
    assert "the shard 00003.tar is passed over: " in caplog.text
    rows = forward._rows
    assert isinstance(rows, WindowedRows)
    assert rows._windows.status()["skipped"]["a shard that is no whole tar file"] >= 1


def test_data_without_a_readable_shard_ends_the_reading(shards: Path) -> None:
    for path in shards.glob("*.tar"):
        path.write_bytes(b"no tar")
    with pytest.raises(DataError, match=r"none of the 7 files can be read, the first '00000\.tar'; make them anew"):
        stream(DataConfig(path=str(shards), window=2)).next(1)


def test_parquet_files_are_read_in_windows_too(tmp_path: Path) -> None:
    for number in range(3):
        write_rows(tmp_path / f"{number}.parquet", [(encoded((number, 0, 0)), f"{number}/{row}") for row in range(4)])
    captions = stream(DataConfig(path=str(tmp_path), window=1)).next(12)[1]
    assert sorted(captions) == [f"{number}/{row}" for number in range(3) for row in range(4)]


def test_a_problem_reads_windows_and_rolls_out_from_the_first_one_s_captions(
    tiny_directory: Path, shards: Path
) -> None:
    problem = tiny_problem(tiny_directory, f"data.path={shards}", "data.window=2")
    latents, captions = problem.forward_data(seed=3).next(12)
    assert latents.shape == (12, *problem.teacher.latent_shape)
    again = problem.forward_data(seed=3)
    again.load_state_dict({"position": 5})
    assert again.next(7)[1] == captions[5:]
    first = Windows(problem.config.data, image_size=16, seed=0).first.data
    assert problem.prompts() == first.captions()
    status = problem.data_status()
    assert status is not None
    assert status["num_rows"] >= 12


def test_what_has_no_windows_is_refused_before_anything_starts(
    tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*tiny_overrides, "data.path=owner/things", "data.window=2"]) == 2
    assert "data.window: 'owner/things' is a hub id, which is fetched whole" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "owner/things"}, "data.window: 'owner/things' is a hub id, which is fetched whole; give its address"),
        ({"format": "folder"}, "data.window: .* is of the format 'folder'; a window is of files that hold many rows"),
    ],
)
def test_what_has_no_windows_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "a.png").write_bytes(encoded((1, 2, 3)))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=message):
        Windows(DataConfig(**{"path": str(tmp_path), "window": 2, **changes}), image_size=8, seed=0)


def test_a_window_and_a_cache_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"data\.window: data\.cache holds all of the data"):
        load_config(None, ["data.window=2", "data.cache=/made"])
