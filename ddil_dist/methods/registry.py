"""The methods that there are: ours, and those that installed packages name as entry points `ddil_dist.methods`."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Final, get_args

from ddil_dist.methods.base import ENTRY_POINTS, Method
from ddil_dist.methods.consistency import Consistency
from ddil_dist.methods.distribution_matching import Dmd2
from ddil_dist.methods.dmd import Dmd
from ddil_dist.methods.guidance import Guidance
from ddil_dist.methods.ladd import Ladd
from ddil_dist.methods.progressive import Progressive
from ddil_dist.methods.trajectory_consistency import TrajectoryConsistency
from ddil_dist.methods.ufogen import Ufogen
from ddil_dist.methods.velocity import Velocity

OURS: Final[tuple[type[Method], ...]] = (
    Progressive,
    Velocity,
    Guidance,
    Consistency,
    TrajectoryConsistency,
    Dmd2,
    Dmd,
    Ladd,
    Ufogen,
)


def all_methods(points: Iterable[EntryPoint]) -> tuple[tuple[type[Method], ...], dict[str, str]]:
    """Ours and those of `points`; and by name, why one of those is not among them.

    A package of others that is broken costs nobody anything who does not ask for its method.
    """
    methods, refused = {name_of(method): method for method in OURS}, {}
    for point in points:
        package = point.dist.name if point.dist else point.value
        try:
            found = point.load()
        except Exception as error:  # whatever a package of others does when it is imported
            refused[point.name] = f"{package} cannot be imported ({type(error).__name__}: {error}); mend or remove it"
            continue
        problem = _problem(found, methods)
        if problem is None:
            methods[name_of(found)] = found
        else:
            refused[point.name] = f"{package}: {problem}; see ddil_dist.methods.Method"
    return tuple(methods.values()), refused


def name_of(method: type[Method]) -> str:
    """The `type` by which a configuration names it."""
    (name,) = get_args(method.model_fields["type"].annotation)
    return str(name)


def _problem(found: object, methods: dict[str, type[Method]]) -> str | None:
    """Why what a package names as a method is none; None where it is one."""
    if not (isinstance(found, type) and issubclass(found, Method)):
        return f"{found!r} is no subclass of Method"
    if missing := [name for name in ("title", "losses") if not hasattr(found, name)]:
        return f"{found.__name__} does not set {' and '.join(missing)}"
    names = get_args(found.model_fields["type"].annotation)
    if len(names) != 1 or found.model_fields["type"].default != names[0]:
        return f"{found.__name__}.type is no Literal of one name with that default"
    return f"the type {names[0]!r} is taken" if names[0] in methods else None


METHODS, REFUSED = all_methods(entry_points(group=ENTRY_POINTS))
"""All that a configuration may name; and what the installed packages name in vain, with the reason."""
