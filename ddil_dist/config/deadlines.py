"""How long the processes of a run wait for one another."""

from __future__ import annotations

from pydantic import Field, model_validator

from ddil_dist.section import PositiveSeconds, Section


class Deadlines(Section):
    """How long the run's processes wait for one another, and for what they stand on; a slow disk needs longer ones.

    Those of single samples, inserts and starts are in the sections of who waits.
    """

    learner_stop_s: PositiveSeconds = Field(
        120.0,
        description="for the learner to stop, since it was last seen to get on: by an update, or a piece of its "
        "checkpoint written",
    )
    fleet_drain_s: PositiveSeconds = Field(
        40.0, description="for the rollout actors to end when the run does; longer than actor_stop_s"
    )
    actor_stop_s: PositiveSeconds = Field(20.0, description="for one rollout actor to finish its work when told to")
    redis_start_s: PositiveSeconds = Field(60.0, description="a learner worker that begins waits so long for Redis")
    redis_away_s: PositiveSeconds = Field(
        60.0, description="Redis may be away so much longer than learner.sample_timeout_s before the run is given up"
    )
    redis_back_s: PositiveSeconds = Field(
        8.0, description="`stop` takes a run whose Redis has not answered for so long for ended, Redis included"
    )
    weights_s: PositiveSeconds = Field(60.0, description="for the weight board to answer one call")
    weights_room_s: PositiveSeconds = Field(
        5.0, description="for Ray's object store to give back the room of versions that were let go of"
    )
    first_weights_s: PositiveSeconds = Field(300.0, description="a rollout actor waits so long for the first version")
    last_weights_s: PositiveSeconds = Field(
        30.0, description="for a version that is on its way to the board when training ends"
    )
    predecessor_s: PositiveSeconds = Field(
        60.0, description="for an earlier supervisor of the run to let go of its directory"
    )
    supervisor_s: PositiveSeconds = Field(60.0, description="for the run's supervisor to answer, or to be restarted")
    ending_s: PositiveSeconds = Field(
        80.0, description="for an embedded Redis and all the rest to end, after the learner and the fleet have"
    )
    launcher_s: PositiveSeconds = Field(30.0, description="a launcher that has not looked for so long is gone")
    resize_s: PositiveSeconds = Field(60.0, description="between looks for nodes that elastic learners can grow onto")
    cluster_connect_s: PositiveSeconds = Field(5.0, description="for the head at RAY_ADDRESS to take a connection")
    resources_s: PositiveSeconds = Field(
        10.0, description="for resources that the cluster has not, and whose nodes may be just starting"
    )
    busy_resources_s: PositiveSeconds = Field(
        60.0, description="for resources that others use: what has just ended gives them back within seconds"
    )
    hub_s: PositiveSeconds = Field(5.0, description="for the hub to take a connection")

    @model_validator(mode="after")
    def _fleet_outlasts_its_actors(self) -> Deadlines:
        if self.fleet_drain_s <= self.actor_stop_s:
            raise ValueError(
                f"fleet_drain_s ({self.fleet_drain_s:g}) must be longer than actor_stop_s ({self.actor_stop_s:g}): the "
                "fleet would be ended before its actors' time is over"
            )
        return self

    @property
    def silence_s(self) -> float:
        """A run whose supervisor has been silent for longer is not going on: it drains its fleet or is restarted."""
        return self.fleet_drain_s + self.supervisor_s
