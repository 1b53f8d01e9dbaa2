"""Drives one buffer, ours or a peer's, as its own process: reads "insert N" and "sample N", answers times as JSON.

`python worker.py KIND --port PORT [--password P]`. Runs in the peer's environment: imports nothing of this project but
for kind "ours". Every kind inserts and samples batches of 224 states of 32 KB with their few numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings

import numpy as np

warnings.simplefilter("ignore")

BATCH = 224
SHAPE = (4, 64, 32)  # float32: 32,768 bytes
CAPACITY = 6 * BATCH * 4
TIMESTEPS = (999, 749, 500, 250)


def make_batch():
    """Latents [BATCH, *SHAPE] float32 and the numbers of a state, by name."""
    rng = np.random.default_rng(0)
    numbers = {
        "timestep": np.array([TIMESTEPS[i % 4] for i in range(BATCH)], np.int64),
        "guidance_scale": np.full(BATCH, 3.0, np.float32),
        "source": np.array([1 + i % 2 for i in range(BATCH)], np.int64),
        "policy_version": np.arange(BATCH, dtype=np.int64) % 20,
    }
    return rng.standard_normal((BATCH, *SHAPE), np.float32), numbers


class Ours:
    """RedisReplay; states carry prompts as well, which the peers' do not."""

    def __init__(self, options):
        from ddil_dist.config import ReplayConfig
        from ddil_dist.replay import RedisReplay
        from ddil_dist.states import States
        from ddil_dist.types import Draw

        config = ReplayConfig(capacity=CAPACITY, min_size=1, error_buffer=1e15)
        url = f"redis://:{options.password}@127.0.0.1:{options.port}/0"
        self.replay = RedisReplay(config, url, run="bench", seed=0)
        latents, numbers = make_batch()
        rows = range(BATCH)
        columns = {
            **{name: column.tolist() for name, column in numbers.items()},
            "step_index": [0] * BATCH,
            "trajectory_id": rows,
            "prompt": [f"a photograph of thing number {i}, in the evening light" for i in rows],
        }
        self.states = States.of(columns, x_t=latents)
        self.draws = [Draw(BATCH)]
        self.batch_id = 0

    def insert(self):
        self.replay.insert(self.states, writer="w", batch_id=self.batch_id, timeout_s=60)
        self.batch_id += 1

    def sample(self):
        return self.replay.sample(self.draws, timeout_s=60).x_t


class StoreStorage:
    """TorchRL's ReplayBuffer over StoreStorage, on the same Redis server."""

    def __init__(self, options):
        import torch
        from tensordict import TensorDict
        from torchrl.data import ReplayBuffer
        from torchrl.data.replay_buffers import StoreStorage as Storage

        torch.set_num_threads(1)
        storage = Storage(max_size=CAPACITY, host="127.0.0.1", port=options.port, db=1, password=options.password)
        self.buffer = ReplayBuffer(storage=storage, batch_size=BATCH)
        latents, numbers = make_batch()
        columns = {"latent": torch.from_numpy(latents), **{k: torch.from_numpy(v) for k, v in numbers.items()}}
        self.data = TensorDict(columns, [BATCH])

    def insert(self):
        self.buffer.extend(self.data)

    def sample(self):
        return self.buffer.sample()["latent"].numpy()


class Reverb:
    """A Reverb server in a process of its own, its writer, and `client.sample`."""

    def __init__(self, options):
        import reverb

        self.reverb = reverb
        self.client = reverb.Client(f"127.0.0.1:{options.port}")
        self.latents, self.numbers = make_batch()

    def insert(self):
        with self.client.trajectory_writer(num_keep_alive_refs=1) as writer:
            for i in range(BATCH):
                writer.append({"latent": self.latents[i], **{k: v[i] for k, v in self.numbers.items()}})
                writer.create_item("t", 1.0, {k: writer.history[k][-1:] for k in ("latent", *self.numbers)})
            writer.flush()

    def sample(self):
        samples = self.client.sample("t", BATCH, emit_timesteps=False)
        return np.concatenate([sample.data[0] for sample in samples])


class ReverbDataset(Reverb):
    """Reverb's TrajectoryDataset, which fetches ahead, batched by TensorFlow."""

    def __init__(self, options):
        super().__init__(options)
        import tensorflow as tf

        self.insert()
        names = {"latent": (tf.float32, (1, *SHAPE)), "timestep": (tf.int64, (1,))}
        names |= {"guidance_scale": (tf.float32, (1,)), "source": (tf.int64, (1,)), "policy_version": (tf.int64, (1,))}
        dataset = self.reverb.TrajectoryDataset(
            f"127.0.0.1:{options.port}",
            table="t",
            dtypes={k: v[0] for k, v in names.items()},
            shapes={k: tf.TensorShape(v[1]) for k, v in names.items()},
            max_in_flight_samples_per_worker=2 * BATCH,
        )
        self.batches = dataset.batch(BATCH).as_numpy_iterator()

    def sample(self):
        return next(self.batches).data["latent"]


class RayRing:
    """A ring of records in a Ray actor; samples are stacked there and read from the object store."""

    def __init__(self, options):
        import ray

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")

        @ray.remote(num_cpus=0)
        class Ring:
            def __init__(self):
                self.slots, self.head, self.rng = [None] * CAPACITY, 0, np.random.default_rng(0)

            def insert(self, latents, numbers):
                for i in range(len(latents)):
                    record = (latents[i].copy(), {k: v[i] for k, v in numbers.items()})
                    self.slots[self.head % CAPACITY] = record
                    self.head += 1

            def sample(self, num):
                picks = self.rng.integers(0, min(self.head, CAPACITY), num)
                return np.stack([self.slots[p][0] for p in picks]), [self.slots[p][1] for p in picks]

        self.ray, self.ring = ray, Ring.remote()
        self.latents, self.numbers = make_batch()

    def insert(self):
        self.ray.get(self.ring.insert.remote(self.latents, self.numbers))

    def sample(self):
        latents, _ = self.ray.get(self.ring.sample.remote(BATCH))
        return np.array(latents)  # a copy of one's own: the object store must be let go of


def serve_reverb(options):
    """Run the Reverb server until standard input closes."""
    import reverb

    table = reverb.Table(
        "t",
        sampler=reverb.selectors.Uniform(),
        remover=reverb.selectors.Fifo(),
        max_size=CAPACITY,
        rate_limiter=reverb.rate_limiters.MinSize(1),
    )
    server = reverb.Server([table], port=options.port)
    print("ready", flush=True)
    sys.stdin.read()
    server.stop()


KINDS = {
    "ours": Ours, "torchrl": StoreStorage, "reverb": Reverb, "reverb-dataset": ReverbDataset, "ray": RayRing,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=[*KINDS, "reverb-server"])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--password", default=None)
    options = parser.parse_args()
    if options.kind == "reverb-server":
        serve_reverb(options)
        return
    buffer = KINDS[options.kind](options)
    print("ready", flush=True)
    for line in sys.stdin:
        operation, num = line.split()
        times = []
        for _ in range(int(num)):
            begin = time.perf_counter()
            found = getattr(buffer, operation)()
            times.append(time.perf_counter() - begin)
            if operation == "sample":
                assert found.shape[0] == BATCH, found.shape
                assert found.dtype == np.float32
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main()
