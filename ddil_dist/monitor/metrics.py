"""A report for Prometheus, in its text format, served over HTTP.

Labels have few values: the run (one a process), the source (four), the timestep (the grid's), who waits for whom (six).
Actors are counted, not named, so that restarts make no new series.
"""

from __future__ import annotations

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from ddil_dist.errors import EnvironmentFailure, WaitTimeoutError
from ddil_dist.replay.unused import starved_share

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
KINDS: Final = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}


class _Page:
    """The metrics of one scrape."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._families: list[Metric] = []

    def add(self, name: str, kind: str, text: str, values: dict[tuple[tuple[str, str], ...], float | None]) -> None:
        """A metric with a sample for each value that is known."""
        known = {labels: value for labels, value in values.items() if value is not None}
        if not known:
            return
        keys = ("run", *(key for key, _ in next(iter(known))))
        family = KINDS[kind](f"ddil_{name}", text, labels=keys)
        for labels, value in known.items():
            family.add_metric((self._run, *(word for _, word in labels)), float(value))
        self._families.append(family)

    def one(self, name: str, kind: str, text: str, value: float | None) -> None:
        """A metric of one value."""
        self.add(name, kind, text, {(): value})

    def collect(self) -> list[Metric]:
        """As a registry asks for them."""
        return self._families

    def text(self) -> str:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry).decode()


def render(report: dict[str, Any], waits_s: dict[str, float]) -> str:
    """The text of a scrape. waits_s: total seconds by "who for whom" (`ReplayStats.waits_s`)."""
    page = _Page(report["run"])
    replay = report["replay"]
    page.one("up", "gauge", "1 while the run's buffer can be read.", 0.0 if replay is None else 1.0)
    if replay is not None:
        _replay(page, replay, waits_s)
    learner = report["learner"]
    page.one("learner_updates_total", "counter", "Student updates made.", learner.get("update"))
    page.one("learner_updates_per_second", "gauge", "Student updates per second.", learner.get("updates_per_s"))
    page.one("learner_waiting_ratio", "gauge", "Share of an update spent waiting.", learner.get("wait_share"))
    page.one("learner_loss", "gauge", "Loss of the newest update.", learner.get("loss"))
    process = report["process"]
    if process is not None and process["phase"] == "evaluation":
        page.one("evaluation_images_made", "gauge", "Images of the final evaluation, all policies.", process["done"])
        page.one("evaluation_images_wanted", "gauge", "As many as it makes.", process["total"])
        page.one("evaluation_left_seconds", "gauge", "Time left of it, as far as known.", process["left_s"])
    weights = report["weights"]
    page.one("weights_version", "gauge", "Newest published weights version.", weights and weights["version"])
    skipped = report["skipped"]
    page.one("data_rows_skipped", "gauge", "Rows of the data known to be unusable.", skipped and skipped["num_skipped"])
    actors = report["actors"]
    states: dict[tuple[tuple[str, str], ...], float | None] = {
        (("state", state),): float(sum(actor["state"] == state for actor in actors))
        for state in ("alive", "loading", "silent", "failed")
    }
    page.add("actors", "gauge", "Rollout actors by state.", states)
    page.one("actors_wanted", "gauge", "Rollout actors asked for.", report["wanted_actors"])
    page.one(
        "actors_on_newest_version",
        "gauge",
        "Rollout actors that applied the newest weights.",
        len(weights["applied_by"]) if weights else None,
    )
    page.one(
        "actors_states_per_second",
        "gauge",
        "States inserted per second by all actors, by their own count.",
        sum(actor["states_per_s"] or 0.0 for actor in actors if actor["state"] == "alive"),
    )
    return page.text()


def _replay(page: _Page, replay: dict[str, Any], waits_s: dict[str, float]) -> None:
    limiter = replay["limiter"]
    page.one("replay_states", "gauge", "Live states.", replay["size"])
    page.one("replay_capacity_states", "gauge", "States that are kept at most.", replay["capacity"])
    page.one("replay_bytes", "gauge", "Bytes of live records.", replay["size_bytes"])
    page.one("replay_capacity_bytes", "gauge", "Bytes of records that are kept at most.", replay["capacity_bytes"])
    page.one("replay_inserted_total", "counter", "States ever inserted.", replay["num_inserted"])
    page.one("replay_sampled_total", "counter", "States ever sampled.", replay["num_sampled"])
    page.one("replay_refused_total", "counter", "Records refused as malformed.", replay["num_refused"])
    page.add(
        "replay_source_states",
        "gauge",
        "Live states by who made them.",
        {(("source", source),): num for source, num in replay["by_source"].items()},
    )
    page.add(
        "replay_waiting_seconds_total",
        "counter",
        "Time that clients waited, by who waits and for what.",
        {(("who", n.partition(" for ")[0]), ("whom", n.partition(" for ")[2])): s for n, s in waits_s.items()},
    )
    page.one("replay_timesteps", "gauge", "Distinct timesteps of live states.", len(replay["by_timestep"]))
    page.one("replay_mean_age_updates", "gauge", "Mean age of states with a policy, by histogram.", _mean_age(replay))
    starved = replay["never_sampled"]
    if starved is not None:
        _never_sampled(page, starved)
    page.one("replay_newest_version", "gauge", "Version that ages count from.", replay["newest_version"])
    page.one("limiter_cursor", "gauge", "inserts * samples_per_insert - samples.", limiter["cursor"])
    page.one("limiter_cursor_min", "gauge", "Samples wait below.", limiter["min_cursor"])
    page.one("limiter_cursor_max", "gauge", "Inserts wait above.", limiter["max_cursor"])


def _never_sampled(page: _Page, starved: dict[str, Any]) -> None:
    page.one("replay_never_sampled_states", "gauge", "States ever inserted that no sample has had.", starved["num"])
    page.one("replay_never_sampled_live_states", "gauge", "Those of them that are live.", starved["live"])
    page.add(
        "replay_never_sampled_ratio",
        "gauge",
        "Share of a timestep's inserted states that no sample has had.",
        {(("timestep", timestep),): starved_share(counts) for timestep, counts in starved["by_timestep"].items()},
    )
    worst = max((starved_share(counts) for counts in starved["by_actor"].values()), default=None)
    page.one("replay_never_sampled_ratio_worst_actor", "gauge", "The same of the actor with the most.", worst)


def _mean_age(replay: dict[str, Any]) -> float | None:
    bins = [b for b in replay["ages"] if b["from"] is not None]
    total = sum(b["num"] for b in bins)
    return sum((b["from"] + b["to"]) / 2 * b["num"] for b in bins) / total if total else None


def make_server(host: str, port: int, scrape: Callable[[], str]) -> ThreadingHTTPServer:
    """An HTTP server whose /metrics answers `scrape()`; 503 with the reason while the run cannot be read."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.partition("?")[0] not in ("/metrics", "/"):
                self._answer(404, "look at /metrics\n")
                return
            try:
                self._answer(200, scrape())
            except (EnvironmentFailure, WaitTimeoutError) as error:
                self._answer(503, f"# {error}\n")

        def _answer(self, status: int, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Scrapes are not news."""

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise EnvironmentFailure(f"--serve: cannot listen on {host}:{port}: {error.strerror}") from None
