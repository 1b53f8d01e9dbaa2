"""The dashboard as a browser sees it: real server, real sockets, a run's real files."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ddil_dist.config import RedisConfig
from ddil_dist.dashboard import server as serving
from ddil_dist.dashboard.__main__ import TOKEN_VARIABLE, main
from ddil_dist.dashboard.panels import now_panel
from ddil_dist.dashboard.server import DashboardServer
from ddil_dist.dashboard.watch import Now, Runs
from ddil_dist.errors import EnvironmentFailure
from tests.report.synthetic_run import make_run

TOKEN = "0123456789abcdef0123"
NASTY = "<script>alert(1)</script>"


def no_redis(path: Path) -> RedisConfig:
    raise EnvironmentFailure(f"run {path.name!r} has finished; {NASTY}")


@contextmanager
def dashboard(directory: Path, token: str | None = None) -> Iterator[DashboardServer]:
    server = DashboardServer("127.0.0.1", 0, Runs(directory, no_redis, interval_s=0.1), token=token)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    make_run(directory / "demo")
    (directory / "no run").mkdir()
    return directory


@pytest.fixture
def server(directory: Path) -> Iterator[DashboardServer]:
    with dashboard(directory) as server:
        yield server


def ask(server: DashboardServer, path: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=30)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), dict(answer.getheaders())
    finally:
        connection.close()


def news(server: DashboardServer, path: str, num: int) -> list[tuple[str, str]]:
    """The first events of a stream."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    assert answer.status == 200
    found, kind = [], ""
    while len(found) < num:
        line = answer.readline().decode().rstrip("\n")
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            found.append((kind, json.loads(line.removeprefix("data: "))))
    connection.close()
    return found


def test_all_runs_are_listed_with_what_has_become_of_them(server: DashboardServer) -> None:
    status, page, _ = ask(server, "/")
    assert status == 200
    assert 'href="/runs/demo"' in page
    assert "no run" not in page
    assert "has finished" in page


def test_a_runs_page_has_its_state_its_commands_and_its_report(server: DashboardServer) -> None:
    status, page, headers = ask(server, "/runs/demo")
    assert status == 200
    for text in ("has finished", "So since", "ddil_dist.scale --run demo", "ddil_dist.stop --run demo", 'id="loss"'):
        assert text in page
    assert NASTY not in page
    assert "&lt;script&gt;" in page
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert set(re.findall(r'(?:src|href)="([^"#][^"]*)"', page)) - {"/"} <= {
        "/dashboard.css",
        "/dashboard.js",
        *re.findall(r'"(data:[^"]*)"', page),
    }
    for part in ("/dashboard.css", "/dashboard.js"):
        assert ask(server, part)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/runs/other",
        "/runs/no%20run",
        "/runs/..",
        "/runs/%2e%2e",
        "/runs/demo/..%2f..%2fetc%2fpasswd",
        "/runs/..%2fdemo",
        "/runs/demo/config.yaml",
        "/%00",
        "/nothing",
    ],
)
def test_only_pages_of_runs_are_there(server: DashboardServer, path: str) -> None:
    assert ask(server, path)[0] == 404


def test_a_host_that_is_not_the_loopback_is_not_answered(server: DashboardServer) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example", "", "demo:80"):
        assert ask(server, "/", Host=host)[0] == 403
    for host in ("localhost", "localhost:8266", "127.0.0.1:1"):
        assert ask(server, "/", Host=host)[0] == 200


def test_a_token_is_asked_for_once_and_then_known_by_a_cookie(
    directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with dashboard(directory, TOKEN) as server:
        for path in ("/", "/events", "/runs/demo", "/dashboard.js", "/?token=", "/?token=wrong", f"/?token={TOKEN}x"):
            assert ask(server, path)[0] == 401
        assert ask(server, "/", Cookie="ddil_dashboard=wrong")[0] == 401
        assert ask(server, "/", Cookie="ddil_dashboard=\u00e9")[0] == 401
        status, _, headers = ask(server, f"/runs/demo?token={TOKEN}", Host="a-node")
        assert (status, headers["Location"]) == (303, "/runs/demo")
        assert {"HttpOnly", "SameSite=Strict"} <= {part.strip() for part in headers["Set-Cookie"].split(";")}
        cookie = headers["Set-Cookie"].split(";")[0]
        assert ask(server, "/runs/demo", Host="a-node", Cookie=cookie)[0] == 200
    out, err = capfd.readouterr()
    assert TOKEN not in out + err


def test_news_come_as_they_happen(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddil_dist.dashboard.watch.REPORT_S", 0.0)
    shutil.copytree(directory / "demo", tmp_path / "demo")
    with dashboard(tmp_path) as server:
        assert "demo" in news(server, "/events", 1)[0][1]
        journal = tmp_path / "demo" / "metrics.jsonl"
        timer = threading.Timer(1.0, lambda: journal.write_text(journal.read_text() + "{}\n"))
        timer.start()
        found = news(server, "/runs/demo/events", 2)
        assert [kind for kind, _ in found] == ["now", "report"]
        timer.join()


def test_streams_are_bounded_and_given_back(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "MOST_STREAMS", 1)
    with dashboard(directory) as server:
        connection = http.client.HTTPConnection(*server.server_address[:2], timeout=30)
        connection.request("GET", "/events")
        assert connection.getresponse().status == 200
        assert ask(server, "/events")[0] == 503
        connection.close()
        assert server.streams.acquire(timeout=10), "a browser that has gone is noticed"
        server.streams.release()


def test_nothing_is_changed_by_asking(server: DashboardServer) -> None:
    for method in ("POST", "PUT", "DELETE"):
        connection = http.client.HTTPConnection(*server.server_address[:2], timeout=30)
        connection.request(method, "/runs/demo")
        assert connection.getresponse().status == 501
        connection.close()


def test_what_a_run_is_at_is_told_and_escaped() -> None:
    report = {
        "bottleneck": "learner waits for inserts 40%",
        "stop_reason": None,
        "skipped": None,
        "process": None,
        "learner": {"phase": "training", "update": 50, "total_updates": 200, "loss": 0.25, "updates_per_s": 2.0},
        "weights": {"version": 12, "size_bytes": 2**20, "applied_by": ["actor-0"]},
        "wanted_actors": 3,
        "autoscale": [1, 4],
        "fleet": {"waiting_for_a_place": 1},
        "replay": {
            "size": 1000,
            "capacity": 4000,
            "inserts_per_s": 10.0,
            "samples_per_s": 20.0,
            "by_source": {"student": 600, "teacher": 400},
            "ages": [{"label": "0-9", "num": 600}],
            "waits": {"sample for inserts": 0.4},
            "limiter": {"settings": {"samples_per_insert": 8.0, "min_size": 16}, "state": "samples wait for inserts"},
            "never_sampled": {"share": 0.2},
        },
        "actors": [
            {"name": "actor-0", "state": "alive", "failed": None, "states_per_s": 10.0, "waiting_share": 0.0,
             "version": 12, "versions_behind": 0, "beat_age_s": 1.0},
            {"name": "actor-1", "state": "failed", "failed": NASTY, "states_per_s": None, "waiting_share": None,
             "version": None, "versions_behind": None, "beat_age_s": 9.0},
        ],
    }  # fmt: skip
    page = now_panel(Now(report))
    for text in (
        "learner waits for inserts 40%",
        "25% of 200",
        "0.25",
        "applied by 1 of 2 actors",
        "60%",
        "8 samples an insert",
        "20% of all inserted",
        "3 wanted; autoscaled from 1 to 4; 1 wait for a node",
    ):
        assert text in page
    assert NASTY not in page


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--run", "never", "--directory", "DIR"], "no run 'never' in"),
        (["--directory", "DIR/absent"], "there is no such directory"),
        (["--directory", "DIR", "--host", "0.0.0.0"], "give a token in DDIL_DASHBOARD_TOKEN"),
        (["--directory", "DIR", "--port", "70000"], "must be from 0 to 65535"),
        (["--directory", "DIR", "--token-file", "DIR/absent"], "cannot be read (FileNotFoundError)"),
    ],
)
def test_bad_input_is_refused_in_a_line(
    directory: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert main([word.replace("DIR", str(directory)) for word in arguments]) == 2
    assert told in capsys.readouterr().err


def test_a_token_that_is_guessed_is_refused(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    assert main(["--directory", str(directory), "--host", "0.0.0.0"]) == 2
    error = capsys.readouterr().err
    assert "at least 16 letters and digits" in error
    assert "secret" not in error


def test_a_port_in_use_is_refused(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with dashboard(directory) as server:
        assert main(["--directory", str(directory), "--port", str(server.server_address[1])]) == 2
    assert "cannot listen on" in capsys.readouterr().err


def test_help_answers_without_what_is_heavy() -> None:
    script = (
        "import sys, contextlib\n"
        "from ddil_dist.dashboard.__main__ import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "assert not {'torch', 'ray', 'matplotlib'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
