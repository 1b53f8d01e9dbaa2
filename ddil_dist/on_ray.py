"""What a run's actors are called on Ray, and where those without resources of their own are put."""

from __future__ import annotations

from typing import Any, Final

NAMESPACE: Final = "ddil"


def actor_name(run: str, part: str = "supervisor") -> str:
    """Name of one of a run's actors. No run's name has a slash, so no two runs' actors have one name."""
    return f"ddil/{run}/{part}"


def on_this_node() -> Any:
    """Scheduling onto the caller's node while it is there: Ray puts actors that need no resources anywhere, and one
    on a node that comes and goes would end with it."""
    import ray

    return ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=True
    )


def free_placement_group(number: str | None) -> None:
    """Give back what a placement group (hexadecimal) holds, its processes among it. Ray Train's do not end with a
    controller that was killed where Ray has no dashboard to ask about it."""
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    if number is not None:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(number)))


def drop_stranded_coordinator(*, timeout_s: float) -> bool:
    """End Ray's coordinator of elastic groups where its node is lost; whether it was. The next group makes another.

    timeout_s: for it to answer; one that is well does so at once.

    There is one a cluster, which Ray pins to the node that first asked for it: once that is lost it can never be
    scheduled again, and every elastic group waits for it without an end.
    """
    import ray

    try:
        coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        ray.get(coordinator.__ray_ready__.remote(), timeout=timeout_s)
    except ValueError:  # there is none yet
        return False
    except ray.exceptions.RayError:  # it cannot be scheduled, or, being restarted for ever, does not answer in time
        ray.kill(coordinator)
        return True
    return False
