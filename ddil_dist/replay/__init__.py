"""The aggregated replay buffer: see `buffer.ReplayBuffer` for what it does, DESIGN for why it is so."""

from ddil_dist.replay.buffer import ReplayBuffer
from ddil_dist.replay.limiter import LimiterSettings, RateLimiter
from ddil_dist.replay.memory import InMemoryReplay
from ddil_dist.replay.redis_replay import RedisReplay
from ddil_dist.replay.server import EmbeddedServer, connect

__all__ = [
    "EmbeddedServer",
    "InMemoryReplay",
    "LimiterSettings",
    "RateLimiter",
    "RedisReplay",
    "ReplayBuffer",
    "connect",
]
