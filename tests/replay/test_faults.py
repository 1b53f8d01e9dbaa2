"""Faults, injected for real: killed writers, a killed server, a full one, a paused one, an emptied one."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ResponseError

from ddil_dist.config import RedisConfig
from ddil_dist.errors import ConfigError, ReplayError, ReplayFullError, WaitTimeoutError
from ddil_dist.replay import EmbeddedServer, RedisReplay, connect
from ddil_dist.replay.codec import Codec
from ddil_dist.replay.reader import ReplayReader
from ddil_dist.replay.shard import _Away, _judge, exchange
from ddil_dist.replay.waits import Deadline
from ddil_dist.states import States
from ddil_dist.types import Draw
from tests.support.states import weights_at

from .support import make_config, make_state, make_states, record_of, record_of_schema_1

pytestmark = pytest.mark.integration

BATCHES_A_LIFE = 20

WRITER = f"""
import sys
from ddil_dist.replay import RedisReplay
from tests.replay.support import make_config, make_states

url, run, journal, writer = sys.argv[1:]
open(journal, "a").close()
acknowledged = [int(line) for line in open(journal).read().split()]
replay = RedisReplay(make_config(capacity=100_000), url, run=run, seed=0)
first = max(acknowledged, default=-1) + 1
batch = first
with open(journal, "a") as file:
    while True:
        states = make_states(batch * 8, batch * 8 + 8, shape=(4, 16, 16))
        if replay.insert(states, writer=writer, batch_id=batch, timeout_s=30) or batch == first:
            file.write(f"{{batch}}\\n")
            file.flush()
        if batch + 1 < first + {BATCHES_A_LIFE}:  # then the last one again and again
            batch += 1
"""


def everything(replay: RedisReplay) -> Counter[int]:
    """Trajectory ids of all live records, each as often as it lies in the buffer."""
    found: Counter[int] = Counter()
    for mirror in replay._view.mirrors:
        with connect(os.environ["DDIL_TEST_URL"]) as client:
            found.update(Codec().decode_all(client.hvals(mirror.shard.keys[1])).trajectory_id.tolist())
    return found


@pytest.fixture
def hurt(own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> tuple[EmbeddedServer, str]:
    """A server to hurt, and its URL."""
    assert own_server.url is not None
    monkeypatch.setenv("DDIL_TEST_URL", own_server.url)
    return own_server, own_server.url


def kill_writers(url: str, tmp_path: Path, kills: int) -> None:
    """SIGKILL writers mid-insert; each next life goes on from its journal, so its last batch may be sent twice."""
    rng = random.Random(0)
    writers = {name: tmp_path / f"{name}.journal" for name in ("a", "b")}

    def start(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", WRITER, url, "killed", str(writers[name]), name])

    def written(name: str) -> int:
        return writers[name].stat().st_size if writers[name].exists() else 0

    before = dict.fromkeys(writers, 0)
    running = {name: start(name) for name in writers}
    try:
        for _ in range(kills):
            name = rng.choice(sorted(writers))
            end = time.monotonic() + 30
            while written(name) == before[name]:
                assert time.monotonic() < end
                time.sleep(0.005)
            time.sleep(rng.random() * 0.02)
            running[name].kill()
            running[name].wait()
            before[name] = written(name)
            running[name] = start(name)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    replay = RedisReplay(make_config(capacity=100_000), url, run="killed", seed=0)
    found, stats = everything(replay), replay.stats()
    acknowledged = Counter(
        number
        for journal in writers.values()
        for batch in map(int, journal.read_text().split())
        for number in range(batch * 8, batch * 8 + 8)
    )
    assert not acknowledged - found, "acknowledged, and not there"
    extra = found - acknowledged  # stored, but the writer was killed before it heard: at most its last batch
    assert sum(extra.values()) <= 8 * len(writers)
    assert sum(extra.values()) % 8 == 0
    assert max(found.values()) <= len(writers)  # both writers number alike: more would be a batch stored twice
    assert stats.size == stats.num_inserted == sum(found.values())
    assert sum(stats.by_source.values()) == stats.size
    replay.close()


class TestKilledWriters:
    def test_nothing_acknowledged_is_lost_and_nothing_is_stored_twice(
        self, hurt: tuple[EmbeddedServer, str], tmp_path: Path
    ) -> None:
        kill_writers(hurt[1], tmp_path, kills=6)

    @pytest.mark.slow
    @pytest.mark.timeout(600)
    def test_three_hundred_times(self, hurt: tuple[EmbeddedServer, str], tmp_path: Path) -> None:
        kill_writers(hurt[1], tmp_path, kills=300)


def kill_server_under_load(server: EmbeddedServer, url: str, times: int) -> None:
    """SIGKILL the server while two threads insert and one samples; all go on, and the books agree afterwards."""
    config = make_config(capacity=600)
    stop = threading.Event()
    inserted: list[int] = []
    sampled: list[int] = []
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # handed to the test
                failures.append(error)
                stop.set()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def insert(writer: str) -> None:
        replay = RedisReplay(config, url, run="load", seed=0)
        for batch in range(10**6):
            if stop.is_set():
                break
            replay.insert(make_states(batch * 8, batch * 8 + 8), writer=writer, batch_id=batch, timeout_s=30)
            inserted.append(8)
        replay.close()

    def sample() -> None:
        replay = RedisReplay(config, url, run="load", seed=1)
        while not stop.is_set():
            found = replay.sample([Draw(32)], timeout_s=30)
            assert (found.x_t[:, 0, 0, 0] == found.trajectory_id).all()
            sampled.append(len(found))
        replay.close()

    threads = [guarded(lambda: insert("a")), guarded(lambda: insert("b")), guarded(sample)]
    for _ in range(times):
        time.sleep(1.5)
        pid = server.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        marks = len(inserted), len(sampled)
        end = time.monotonic() + 30
        while not failures and (len(inserted) < marks[0] + 10 or len(sampled) < marks[1] + 10):
            assert time.monotonic() < end, "no progress after the restart"
            time.sleep(0.02)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    replay = RedisReplay(config, url, run="load", seed=0)
    stats = replay.stats()
    found = everything(replay)
    assert stats.size == sum(found.values()) == 600
    assert stats.size_bytes == sum(len(record_of(make_state(n))) * times for n, times in found.items())
    assert max(found.values()) <= 2  # each of two writers once
    assert 0 < stats.num_inserted <= sum(inserted)
    replay.close()


class TestKilledServer:
    def test_load_goes_on_after_a_restart(self, hurt: tuple[EmbeddedServer, str]) -> None:
        kill_server_under_load(*hurt, times=2)

    @pytest.mark.slow
    def test_eight_times(self, hurt: tuple[EmbeddedServer, str]) -> None:
        kill_server_under_load(*hurt, times=8)

    def test_a_server_that_stays_away_is_named_at_the_deadline(self, hurt: tuple[EmbeddedServer, str]) -> None:
        server, url = hurt
        replay = RedisReplay(make_config(), url, run="gone", seed=0)
        replay.insert(make_states(0, 4), writer="w", batch_id=0, timeout_s=5)
        server.stop()
        begin = time.monotonic()
        with pytest.raises(
            WaitTimeoutError, match=r"an insert waited \d.\d s for the replay server 127.0.0.1:\d+ .*is it"
        ):
            replay.insert(make_states(4, 8), writer="w", batch_id=1, timeout_s=1.0)
        with pytest.raises(WaitTimeoutError, match=r"for the replay server 127.0.0.1:\d+"):
            replay.sample([Draw(4)], timeout_s=1.0)
        assert time.monotonic() - begin < 6
        replay.close()

    def test_an_emptied_server_is_noticed_and_filled_again(
        self, hurt: tuple[EmbeddedServer, str], caplog: pytest.LogCaptureFixture
    ) -> None:
        _, url = hurt
        config = make_config(min_size=10)
        writer, learner = (RedisReplay(config, url, run="emptied", seed=seed) for seed in (0, 1))
        writer.insert(make_states(0, 20), writer="w", batch_id=0, timeout_s=5)
        learner.note_weights(weights_at(7))
        learner.configure(max_staleness=9)
        learner.sample([Draw(10)], timeout_s=5)
        before = learner.stats().incarnation
        with connect(url) as client:
            client.flushall()
        with pytest.raises(WaitTimeoutError, match=r"0 states are live, replay.min_size is 10"):
            learner.sample([Draw(10)], timeout_s=0.3)
        assert "lost its data" in caplog.text
        assert writer.insert(make_states(100, 120), writer="w", batch_id=1, timeout_s=5)
        found = learner.sample([Draw(40)], timeout_s=5)
        assert set(found.trajectory_id.tolist()) <= set(range(100, 120))
        stats = learner.stats()
        assert stats.incarnation != before
        assert (stats.size, stats.num_inserted, stats.newest_version) == (20, 20, 7)
        assert stats.settings["max_staleness"] == 9
        writer.close()
        learner.close()


class TestFullServer:
    def test_an_insert_waits_for_room_then_tells_the_remedy(self, hurt: tuple[EmbeddedServer, str]) -> None:
        _, url = hurt
        replay = RedisReplay(make_config(), url, run="full", seed=0)
        replay.insert(make_states(0, 8), writer="w", batch_id=0, timeout_s=5)
        with connect(url) as client:
            client.config_set("maxmemory", 1_000_000)
            large = make_states(0, 8, prompt="x" * 20_000)
            stuck, error = 1, None
            while error is None:
                try:
                    replay.insert(large, writer="w", batch_id=stuck, timeout_s=1)
                    stuck += 1
                except ReplayFullError as full:
                    error = str(full)
            assert re.fullmatch(
                r"an insert waited \d.\d s for room on the replay server 127.0.0.1:\d+: it uses \d+ of maxmemory "
                r"1000000 bytes; raise the server's maxmemory or lower replay.capacity_bytes",
                error,
            )
            size = replay.stats().size
            threading.Timer(0.5, lambda: client.config_set("maxmemory", 0)).start()
            assert replay.insert(make_states(0, 8), writer="w", batch_id=stuck, timeout_s=10)
            time.sleep(0.2)
        stats = replay.stats()
        assert stats.size == size + 8 == stuck * 8 + 8
        assert stats.waits_s["insert for memory"] > 0.5
        replay.close()


class TestReplica:
    def test_a_server_that_became_a_replica_is_connected_to_anew(self, hurt: tuple[EmbeddedServer, str]) -> None:
        _, url = hurt
        replay = RedisReplay(make_config(), url, run="replica", seed=0)
        shard = replay._view.first.shard
        with connect(url) as client:
            client.replicaof("127.0.0.1", 1)
            before = shard.epoch
            with pytest.raises(WaitTimeoutError, match="READONLY"):
                replay.insert(make_states(0, 4), writer="w", batch_id=0, timeout_s=0.5)
            assert shard.epoch > before, "its address may belong to the new master by now"
            client.replicaof("NO", "ONE")
        assert replay.insert(make_states(0, 4), writer="w", batch_id=0, timeout_s=10)
        replay.close()

    def test_a_server_that_cannot_save_is_told_with_its_own_reason(self, hurt: tuple[EmbeddedServer, str]) -> None:
        _, url = hurt
        replay = RedisReplay(make_config(), url, run="misconf", seed=0)
        error = ResponseError("MISCONF Redis is configured to save RDB snapshots, but cannot persist on disk")
        with pytest.raises(_Away) as caught:
            _judge(replay._view.first.shard, error)
        told = str(caught.value.at_deadline("an insert", Deadline(0)))
        assert "MISCONF Redis is configured to save RDB snapshots" in told
        assert "make room on its disk" in told
        assert "maxmemory" not in told
        replay.close()


class TestRepeatedCalls:
    def test_a_charge_that_is_sent_again_counts_once(self, make_redis: Callable[..., RedisReplay]) -> None:
        replay = make_redis(make_config())
        replay.insert(make_states(0, 8), writer="w", batch_id=0, timeout_s=5)
        first = replay._view.first
        for name in ("a", "a", "b"):
            slots = (3).to_bytes(4, "little") + (3 if name == "a" else 5).to_bytes(4, "little")
            packed = first.shard.call("charge", first.incarnation, name, 2, 8, slots, 1, 2)
            assert exchange([(first.shard, packed, 1)], Deadline(5), who="a test") == [[1]]
        stats = replay.stats()
        assert stats.num_sampled == 4
        assert (stats.num_unused, dict(stats.used_by_actor)) == (6, {"w": 2})

    def test_a_state_that_several_clients_sample_is_used_once(self, make_redis: Callable[..., RedisReplay]) -> None:
        clients = [make_redis(make_config(), seed=seed, shards=2) for seed in range(3)]
        for batch in range(2):
            clients[0].insert(make_states(batch * 10, batch * 10 + 10), writer="w", batch_id=batch, timeout_s=5)
        used = {n for client in clients for n in client.sample([Draw(8)], timeout_s=5).trajectory_id.tolist()}
        for client in clients:
            client._view.mirrors[0].shard.epoch += 1  # as if its connection had broken: it reads all anew
            used |= set(client.sample([Draw(2)], timeout_s=5).trajectory_id.tolist())
        stats = clients[1].stats()
        assert (dict(stats.used_by_timestep), stats.num_unused) == ({999: len(used)}, 20 - len(used))

    def test_a_sample_that_waits_hears_that_the_buffer_is_closed(
        self, make_redis: Callable[..., RedisReplay], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        replay = make_redis(make_config())
        errors: list[Exception] = []
        waits, pause = threading.Event(), replay._waits.pause

        def paused(*arguments: Any) -> bool:
            waits.set()
            return pause(*arguments)

        monkeypatch.setattr(replay._waits, "pause", paused)

        def wait() -> None:
            try:
                replay.sample([Draw(1)], timeout_s=100)
            except ReplayError as error:
                errors.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        assert waits.wait(20)
        replay.close()
        thread.join(20)
        assert not thread.is_alive()
        assert "the replay buffer was closed" in str(errors[0])


class TestPausedServer:
    def test_an_answer_is_awaited_as_long_as_the_configuration_says(self, hurt: tuple[EmbeddedServer, str]) -> None:
        _, url = hurt
        config = RedisConfig(url=url, answer_timeout_s=0.3)
        replay = RedisReplay(make_config(), config, run="impatient", seed=0)
        reader = ReplayReader(config, "impatient")
        with connect(url) as client:
            client.execute_command("CLIENT", "PAUSE", 30_000)
        try:
            for ask, limit_s in ((reader.stats, 0.3), (replay.stats, 0.9)):
                with pytest.raises(WaitTimeoutError) as caught:
                    ask()
                waited = re.search(r"waited (\d+\.\d) s", str(caught.value))
                assert waited is not None
                assert limit_s <= float(waited[1]) < 10, "of 10 and 30 s where nothing is said"
        finally:
            replay.close()
            reader.close()

    def test_clients_wait_out_a_pause(self, hurt: tuple[EmbeddedServer, str]) -> None:
        _, url = hurt
        replay = RedisReplay(make_config(), url, run="paused", seed=0)
        replay.insert(make_states(0, 8), writer="w", batch_id=0, timeout_s=5)
        with connect(url) as client:
            client.execute_command("CLIENT", "PAUSE", 1000)
        begin = time.monotonic()
        assert replay.insert(make_states(8, 16), writer="w", batch_id=1, timeout_s=10)
        assert time.monotonic() - begin > 0.8
        assert len(replay.sample([Draw(4)], timeout_s=5)) == 4
        assert replay.stats().size == 16
        replay.close()

    def test_a_new_version_does_not_wait_for_a_sample_that_waits(self, make_redis: Callable[..., RedisReplay]) -> None:
        replay = make_redis(make_config())
        with replay._view.lock:  # as a sample holds it while a server is away
            noting = threading.Thread(target=replay.note_weights, args=(weights_at(7),))
            noting.start()
            noting.join(20)
            assert not noting.is_alive()
        assert replay.stats().newest_version == 7

    def test_a_stopped_server_does_not_hold_a_client_past_its_deadline(self, hurt: tuple[EmbeddedServer, str]) -> None:
        server, url = hurt
        replay = RedisReplay(make_config(), url, run="stopped", seed=0)
        pid = server.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            begin = time.monotonic()
            with pytest.raises(WaitTimeoutError, match="for the replay server"):
                replay.insert(make_states(0, 8), writer="w", batch_id=0, timeout_s=1.0)
            assert time.monotonic() - begin < 3
        finally:
            os.kill(pid, signal.SIGCONT)
        replay.insert(make_states(0, 8), writer="w", batch_id=0, timeout_s=10)
        assert replay.stats().size == 8  # once, though the first try arrived as well
        replay.close()


class TestOlderRecords:
    def test_a_buffer_that_older_code_filled_is_read(self, make_redis: Callable[..., RedisReplay]) -> None:
        replay = make_redis(make_config())
        replay.insert(make_states(0, 8), writer="w", batch_id=0, timeout_s=5)
        shard = replay._view.first.shard
        for number in range(8):
            shard._client.hset(shard.keys[1].decode(), str(number), record_of_schema_1(number))
        found = replay.sample([Draw(200)], timeout_s=5)
        assert set(found.trajectory_id.tolist()) == set(range(8))
        assert found.prompt == [f"state {number}" for number in found.trajectory_id]
        assert (found.x_t[:, 0, 0, 0] == found.trajectory_id).all()
        assert set(found.policy_version.tolist()) == {0}
        assert replay.stats().num_refused == 0


class TestNeighbours:
    def test_two_runs_on_one_server_do_not_see_each_other(self, server: EmbeddedServer) -> None:
        assert server.url is not None
        one, two = (RedisReplay(make_config(), server.url, run=f"neighbour-{n}", seed=0) for n in (1, 2))
        one.insert(make_states(0, 30), writer="w", batch_id=0, timeout_s=5)
        assert two.stats().size == 0
        assert two.insert(make_states(100, 110), writer="w", batch_id=0, timeout_s=5)
        one.note_weights(weights_at(40))
        one.configure(samples_per_insert=3.0)
        assert set(one.sample([Draw(200)], timeout_s=5).trajectory_id.tolist()) == set(range(30))
        assert set(two.sample([Draw(90)], timeout_s=5).trajectory_id.tolist()) == set(range(100, 110))
        assert (two.stats().newest_version, two.stats().settings["samples_per_insert"]) == (0, 1.0)
        one.close()
        two.close()


class TestOtherBounds:
    def test_a_buffer_is_not_opened_with_other_bounds(self, make_redis: Callable[..., RedisReplay]) -> None:
        make_redis(make_config(capacity=100))
        with pytest.raises(ConfigError, match=r"replay.capacity: 50, but this run's buffer exists with 100; keep that"):
            make_redis(make_config(capacity=50))
        with pytest.raises(ConfigError, match=r"replay.removal: reservoir, but .* exists with oldest"):
            make_redis(make_config(capacity=100, removal="reservoir"))

    def test_settings_stay_as_they_were_changed(self, make_redis: Callable[..., RedisReplay]) -> None:
        make_redis(make_config()).configure(samples_per_insert=3.0)
        assert make_redis(make_config()).stats().settings["samples_per_insert"] == 3.0


class TestDamagedRecords:
    def test_they_are_taken_out_and_counted_and_never_reach_a_learner(
        self, make_redis: Callable[..., RedisReplay], server: EmbeddedServer
    ) -> None:
        replay = make_redis(make_config())
        replay.insert(make_states(0, 20), writer="w", batch_id=0, timeout_s=5)
        good = record_of(make_state(0))
        damaged = [b"", good[:50], b"\x94\x03" + good[2:], b"\x80\x04pickle", record_of(make_state(0, shape=(9, 1, 1)))]
        with connect(str(server.url)) as client:
            for slot, record in enumerate(damaged):
                client.hset(replay._view.first.shard.keys[1].decode(), str(slot), record)
        for _ in range(10):
            found = replay.sample([Draw(40)], timeout_s=5)
            assert set(found.trajectory_id.tolist()) <= set(range(5, 20))
        stats = replay.stats()
        assert (stats.num_refused, stats.size, sum(stats.by_version.values())) == (5, 15, 15)
        assert (stats.num_unused, dict(stats.used_by_actor)) == (0, {"w": 20})
        assert stats.size_bytes == sum(len(record_of(make_state(n))) for n in range(5, 20))
        for batch in range(1, 120):  # the ring goes around over the holes
            replay.insert(make_states(batch * 20, batch * 20 + 20), writer="w", batch_id=batch, timeout_s=5)
        assert replay.stats().size == 1000


class TestWrappingRing:
    def test_a_learner_that_samples_while_the_ring_wraps_gets_what_it_asked_for(
        self, make_redis: Callable[..., RedisReplay]
    ) -> None:
        config = make_config(capacity=64)
        writer, learner = make_redis(config), make_redis(config, seed=1)
        writer.insert(make_states(0, 64, timestep=0), writer="w", batch_id=0, timeout_s=5)
        stop = threading.Event()

        def insert() -> None:
            for batch in range(1, 10**6):
                if stop.is_set():
                    break
                states = States.join([make_state(batch * 32 + n, timestep=n % 2) for n in range(32)])
                writer.insert(states, writer="w", batch_id=batch, timeout_s=5)

        thread = threading.Thread(target=insert)
        thread.start()
        try:
            newest = 0
            for _ in range(150):
                found = learner.sample(
                    [Draw(10, timesteps=frozenset({1})), Draw(10, timesteps=frozenset({0}))], timeout_s=9
                )
                assert found.timestep.tolist() == [1] * 10 + [0] * 10
                assert (found.x_t[:, 0, 0, 0] == found.trajectory_id).all()
                newest = max(newest, int(found.trajectory_id.max()))
        finally:
            stop.set()
            thread.join()
        assert newest > 10 * 64


class TestWeightsNote:
    def test_a_new_store_s_older_weights_are_the_newest_again(self, server: EmbeddedServer) -> None:
        assert server.url is not None
        with_note = RedisReplay(make_config(), server.url, run="noted", seed=0)
        with_note.note_weights(weights_at(180))
        after = RedisReplay(make_config(), server.url, run="noted", seed=0)
        after.forget_weights()
        assert after.stats().weights is None
        after.note_weights(weights_at(100))
        with_note.insert(make_states(0, 8), writer="w", batch_id=0, timeout_s=5)
        weights = after.stats().weights
        assert weights is not None
        assert weights.version == 100
        for replay in (with_note, after):
            replay.close()

    @pytest.mark.parametrize("note", ["no json", "[]", '{"version": "x"}', '{"version": 3, "more": 1}'])
    def test_a_note_that_is_none_is_passed_over_and_written_anew(self, server: EmbeddedServer, note: str) -> None:
        assert server.url is not None
        replay = RedisReplay(make_config(), server.url, run=f"spoilt{abs(hash(note))}", seed=0)
        replay.insert(make_states(0, 8), writer="w", batch_id=0, timeout_s=5)
        (mirror,) = replay._view.mirrors
        with connect(RedisConfig(url=server.url)) as client:
            client.hset(mirror.shard.keys[0], "weights", note)
        assert replay.stats().weights is None
        assert len(replay.sample([Draw(4)], timeout_s=5)) == 4
        replay.note_weights(weights_at(7))
        weights = replay.stats().weights
        assert weights is not None
        assert weights.version == 7
        replay.close()
