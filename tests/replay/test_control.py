"""A run's control keys: what one shell writes, another reads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ddil_dist import control as control_module
from ddil_dist.control import RunControl
from ddil_dist.errors import EnvironmentFailure
from ddil_dist.replay import EmbeddedServer, connect

pytestmark = pytest.mark.integration


@pytest.fixture
def control(server: EmbeddedServer, run_name: str) -> Iterator[RunControl]:
    one = RunControl.from_url(str(server.url), run_name)
    yield one
    one.close()


class TestRunControl:
    def test_before_anything_is_written(self, control: RunControl) -> None:
        assert control.wanted_actors() is None
        assert not control.stop_requested()
        assert control.heartbeats() == {}
        assert control.learner_status() == {}

    def test_a_restart_after_a_checkpoint_that_was_asked_for_is_no_death(self, control: RunControl) -> None:
        assert [control.count_start(40) for _ in range(3)] == [1, 2, 3]
        control.ask_for_checkpoint(within_s=0.5)
        assert control.checkpoint_wanted()
        control.checkpoint_taken()
        assert not control.checkpoint_wanted()
        assert control.count_start(40) == 1

    def test_a_run_is_alive_until_its_supervisor_was_silent_for_long_enough(self, control: RunControl) -> None:
        assert not control.is_alive()
        control.set_supervisor({"state": "running"}, alive_s=0.2)
        assert control.is_alive()
        ttl_s = int(control._redis.ttl(control._prefix + "alive"))
        assert ttl_s == 1, "Redis counts whole seconds; it is not given less than was asked for"
        control.set_supervisor({"state": "running"}, alive_s=500)
        assert control._redis.ttl(control._prefix + "alive") > 490
        control.set_supervisor({"state": "ended"}, alive_s=500)
        assert not control.is_alive()

    def test_what_is_written_is_read_by_another(self, control: RunControl, server: EmbeddedServer) -> None:
        control.set_wanted_actors(3)
        control.request_stop("a signal")
        control.set_learner_status({"phase": "training", "update": 4, "time": 12.5})
        other = RunControl.from_url(str(server.url), control.run)
        assert other.wanted_actors() == 3
        assert (other.stop_requested(), other.stop_reason()) == (True, "a signal")
        assert other.learner_status() == {"phase": "training", "update": 4, "time": 12.5}
        other.clear_stop()
        assert not control.stop_requested()
        other.close()

    def test_incarnations_rise_past_what_is_known_where_the_server_lost_its_data(self, control: RunControl) -> None:
        assert [control.next_incarnation("actor-9", above=7), control.next_incarnation("actor-9", above=8)] == [8, 9]
        assert control.next_incarnation("actor-9") == 10

    def test_incarnations_never_repeat(self, control: RunControl) -> None:
        assert [control.next_incarnation("actor-0") for _ in range(3)] == [1, 2, 3]
        assert control.next_incarnation("actor-1") == 1

    def test_news_are_taken_once_and_the_newest_are_kept(
        self, control: RunControl, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert control.take_news() == []
        monkeypatch.setattr(control_module, "MAX_NEWS", 3)
        for number in range(5):
            control.tell(f"sentence {number}")
        assert control.take_news() == ["sentence 2", "sentence 3", "sentence 4"]
        assert control.take_news() == []

    def test_old_heartbeats_are_forgotten(self, control: RunControl, monkeypatch: pytest.MonkeyPatch) -> None:
        control.heartbeat("actor-0", {"version": 1})
        control.heartbeat("actor-1", {"version": 2})
        found = control.heartbeats()
        assert {name: beat["version"] for name, beat in found.items()} == {"actor-0": 1, "actor-1": 2}
        control.forget("actor-0")
        assert list(control.heartbeats()) == ["actor-1"]
        monkeypatch.setattr(control_module, "FORGET_AFTER_S", -1.0)
        assert control.heartbeats() == {}
        monkeypatch.undo()
        assert control.heartbeats() == {}

    def test_all_keys_begin_alike_so_that_a_cluster_keeps_them_together(
        self, control: RunControl, server: EmbeddedServer
    ) -> None:
        control.set_wanted_actors(1)
        control.heartbeat("a", {})
        control.next_incarnation("a")
        with connect(str(server.url)) as client:
            keys = {key.decode() for key in client.scan_iter(f"*{control.run}*control*")}
        prefix = f"ddil:{{{control.run}}}:control:"
        assert keys == {prefix + name for name in ("wanted-actors", "heartbeats", "incarnations")}

    def test_a_server_that_is_gone_is_told(self, own_server: EmbeddedServer) -> None:
        control = RunControl.from_url(str(own_server.url), "gone")
        own_server.stop()
        with pytest.raises(EnvironmentFailure, match="the Redis server of run gone cannot be reached"):
            control.wanted_actors()
        control.close()
