"""States of the imitation problem in columns: the one declaration of what a replay record holds.

An actor makes `States` of arrays, replay keeps each row as a record (`ddil_dist.replay.codec`) and hands rows back as
`States` of arrays, and the learner trains on `States` of tensors. The record's bytes, the columns that a sample is
decoded into, the compact metadata that draws choose by and the learner's batch all follow from the fields below, so
that a new field is a line there: with a default, records that were written without it are still read.

No torch is needed before there are tensors: who only watches a run reads replay without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Final, Generic, Self, TypeVar, cast

import numpy as np
import numpy.typing as npt

from ddil_dist.errors import RecordError
from ddil_dist.types import FINAL_TIMESTEP, NO_POLICY, LatentDtype, StateSource

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ddil_dist.models.conditioning import Conditioning

Array = TypeVar("Array")
"""Of a column: an array at rest, a tensor at the learner."""

LATENT_DTYPES: Final[dict[LatentDtype, np.dtype[Any]]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}
"""Dtypes of latents at rest, and of the arrays that carry them: numpy has no bfloat16, so its bit patterns travel."""

MAX_SIDE: Final = 65_536
"""Largest C, H or W that is believed."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a field of `States` is in a record.

    type       of its value in a record: int, float or str; bytes: a latent, of the dtype and shape of all latents.
    dtype      of its column; of a latent, what carries it.
    bounds     inclusive, of an integer.
    meta       its dtype in the metadata that draws choose by; None: it is no part of that.
    default    of a record that was written without the field; None: there is no such record. A latent may be left out.
    """

    type: type[Any]
    dtype: str = ""
    bounds: tuple[int, int] = (-(2**63), 2**63 - 1)
    meta: str | None = None
    default: int | float | str | None = None
    optional: bool = False


def _declare(kind: Kind) -> Any:
    left_out = kind.optional or kind.default is not None
    return field(default=None if left_out else MISSING, metadata={"kind": kind})


def latent(*, optional: bool = False) -> Any:
    """A latent, [C, H, W] a state. optional: all states of a batch have it, or none."""
    return _declare(Kind(bytes, optional=optional))


def integer(
    low: int = -(2**63), high: int = 2**63 - 1, *, dtype: str = "int64", meta: str | None = None, default: Any = None
) -> Any:
    """An integer from low to high, both inclusive."""
    return _declare(Kind(int, dtype, (low, high), meta, default))


def number(*, default: float | None = None) -> Any:
    """A number, float32 in its column."""
    return _declare(Kind(float, "float32", default=default))


def text(*, default: str | None = None) -> Any:
    """A text of any length; its column is a list."""
    return _declare(Kind(str, default=default))


def unrecorded() -> Any:
    """What is known of a state only later, and by whom: no part of a record."""
    return field(default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class States(Generic[Array]):
    """B states, (x_t, t, prompt), where each came from, and the expert's answers. Order is that of records' fields.

    x_t              [B, C, H, W], VAE-scaled; float32 at the learner.
    source           [B] uint8, `StateSource`: who led here.
    timestep         [B], t on the training grid, 0 to 999.
    policy_version   [B], student version of the newest student transition on the way here; NO_POLICY if there was none.
    step_index       [B], position on the student grid, 0 at pure noise.
    trajectory_id    [B], unique within a run, and its trajectory's seed (`actors.starts`); -1 of what came from none.
    guidance_scale   [B] float32, w of x_uncond + w (x_cond - x_uncond); 1 means none.
    prompt           B texts of any length; "" is the unconditional prompt.
    label            [B, C, H, W], the expert's answers: x_s at the student's next grid point; None if it was not asked.
    staleness        [B], student updates between the policy and the newest when it was sampled; 0 for NO_POLICY.
    conditioning     B encoded prompts, at the learner.
    """

    x_t: Array = latent()
    source: Array = integer(0, len(StateSource) - 1, dtype="uint8", meta="u1")
    timestep: Array = integer(FINAL_TIMESTEP, 2**15 - 1, meta="<i2")
    policy_version: Array = integer(NO_POLICY, 2**31 - 1, meta="<i4", default=NO_POLICY)
    step_index: Array = integer()
    trajectory_id: Array = integer(default=-1)
    guidance_scale: Array = number()
    prompt: list[str] = text()
    label: Array | None = latent(optional=True)
    staleness: Array = unrecorded()
    conditioning: Conditioning = unrecorded()

    @classmethod
    def kinds(cls) -> dict[str, Kind]:
        """What a record holds: the recorded fields by name, in their order."""
        return {one.name: one.metadata["kind"] for one in fields(cls) if "kind" in one.metadata}

    @classmethod
    def of(cls, columns: Mapping[str, Sequence[Any]], **given: Any) -> Self:
        """States of plain values by field, where those with a default may be left out, and of the columns `given`."""
        num = len(next(iter(columns.values())))
        made: dict[str, Any] = given
        for name, kind in cls.kinds().items():
            if kind.type is not bytes:
                values = columns.get(name, [kind.default] * num)
                made[name] = list(values) if kind.type is str else np.array(values, kind.dtype)
        return cls(**made)

    def checked(self) -> tuple[dict[str, npt.NDArray[Any] | None], dict[str, list[Any]]]:
        """What a record holds of them: latents at rest, C-contiguous and alike, and the other fields' plain values.

        Raises RecordError where a state breaks a rule of the declaration.
        """
        kinds = self.kinds()
        latents: dict[str, npt.NDArray[Any] | None] = {}
        like: npt.NDArray[Any] | None = None
        for name, kind in kinds.items():
            if kind.type is bytes:
                column = getattr(self, name)
                latents[name] = None if column is None and kind.optional else _checked_latents(name, column, like)
                like = like if latents[name] is None else latents[name]
        assert like is not None, "a latent of every state is required"
        values = {
            name: _checked_values(name, getattr(self, name), kind, len(like))
            for name, kind in kinds.items()
            if kind.type is not bytes
        }
        return latents, values

    def __len__(self) -> int:
        return len(self.x_t)  # type: ignore[arg-type]

    def rows(self, places: Sequence[int]) -> Self:
        """Copies of the rows at these places."""
        index: Any = np.array(places, np.int64)
        if not isinstance(self.x_t, np.ndarray):
            import torch

            index = torch.from_numpy(index).to(self.x_t.device)  # type: ignore[attr-defined]
        return type(self)(**{one.name: _chosen(getattr(self, one.name), places, index) for one in fields(self)})

    def split(self, size: int) -> list[Self]:
        """Batches of `size` rows, in order; the last may have fewer."""
        if size >= len(self):
            return [self]
        begins = range(0, len(self), size)
        return [self.rows(range(begin, min(begin + size, len(self)))) for begin in begins]

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """The rows of all parts, in order; without the answers where some part has none."""
        if len(parts) == 1:
            return parts[0]
        columns = ((one.name, [getattr(part, one.name) for part in parts]) for one in fields(cls))
        return cls(**{name: _joined(column) for name, column in columns})

    def tensors(self, device: torch.device) -> States[Tensor]:
        """The same states as tensors on the learner's device."""
        columns = {one.name: getattr(self, one.name) for one in fields(self)}
        arrays = {name: column for name, column in columns.items() if isinstance(column, np.ndarray)}
        latents = {name for name, kind in self.kinds().items() if kind.type is bytes}
        moved = {name: _moved(array, device, latent=name in latents) for name, array in arrays.items()}
        made: Any = replace(self, **moved)  # type: ignore[arg-type]
        return cast("States[Tensor]", made)


def at_rest(tensor: Tensor, dtype: LatentDtype = "float32") -> npt.NDArray[Any]:
    """A copy of latents [B, C, H, W] as they lie in replay, off the device in one go."""
    import torch

    rest = tensor.detach().to(getattr(torch, dtype)).cpu().contiguous()
    return (rest.view(torch.uint16) if dtype == "bfloat16" else rest).numpy().copy()


def to_tensor(array: npt.NDArray[Any]) -> Tensor:
    """The tensor, in its own dtype, that latents at rest are; it shares their memory."""
    import torch

    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == LATENT_DTYPES["bfloat16"] else tensor


def layout_of(carrier: np.dtype[Any], shape: Sequence[int]) -> str:
    """Dtype and shape of a latent in one word, such as `float32:4x64x64`."""
    name = next(name for name, known in LATENT_DTYPES.items() if known == carrier)
    return f"{name}:{'x'.join(map(str, shape))}"


def _checked_latents(name: str, array: Any, like: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
    """C-contiguous; raises RecordError where they are none, or others than `like`."""
    if not isinstance(array, np.ndarray) or array.dtype not in LATENT_DTYPES.values():
        carriers = ", ".join(f"{carrier.name} ({dtype})" for dtype, carrier in LATENT_DTYPES.items())
        raise RecordError(f"{name} is {getattr(array, 'dtype', type(array).__name__)}; it must be {carriers}")
    if array.ndim != 4 or min(array.shape) < 1 or max(array.shape[1:]) > MAX_SIDE:
        raise RecordError(f"{name} has shape {array.shape}; expected [B, C, H, W], each 1 to {MAX_SIDE}")
    if like is not None and (array.dtype != like.dtype or array.shape != like.shape):
        ours, theirs = (layout_of(one.dtype, one.shape[1:]) for one in (array, like))
        raise RecordError(f"{name} is {ours} of {len(array)} states, the others {theirs} of {len(like)}")
    return np.ascontiguousarray(array)


def _checked_values(name: str, column: Any, kind: Kind, num: int) -> list[Any]:
    """Plain values, one for each of `num` rows; raises RecordError."""
    if column is None and kind.default is not None:
        return [kind.default] * num
    values: Any = column.tolist() if isinstance(column, np.ndarray) else column
    if type(values) is not list or len(values) != num:
        raise RecordError(f"{name}: {column!r:.80}; it must be a column of {num} rows")
    types = (int, float) if kind.type is float else kind.type
    for value in values:
        if not isinstance(value, types) or isinstance(value, bool):
            raise RecordError(f"{name}: {value!r:.80} is {type(value).__name__}; it must be {kind.type.__name__}")
        if kind.type is int and not kind.bounds[0] <= value <= kind.bounds[1]:
            raise RecordError(f"{name}: {value}; it must be {kind.bounds[0]} to {kind.bounds[1]}")
    return [float(value) for value in values] if kind.type is float else list(values)


def _moved(array: npt.NDArray[Any], device: torch.device, *, latent: bool) -> Tensor:
    import torch

    tensor = to_tensor(array) if latent else torch.from_numpy(array)
    dtype = torch.float32 if latent else tensor.dtype
    if device.type == "cuda":  # pinned, so that the copy does not wait for what the GPU is doing
        return tensor.pin_memory().to(device, dtype, non_blocking=True)
    return tensor.to(device, dtype)


def _chosen(column: Any, places: Sequence[int], index: Any) -> Any:
    """Rows of a column; `index` has the places on its device, so that texts need not be awaited from there."""
    if isinstance(column, list):
        return [column[place] for place in places]
    if column is None or hasattr(column, "dtype"):
        return None if column is None else column[index]
    return column.select(index)


def _joined(columns: list[Any]) -> Any:
    first = columns[0]
    if any(column is None for column in columns):
        return None
    if isinstance(first, list):
        return [text for column in columns for text in column]
    if isinstance(first, np.ndarray):
        return np.concatenate(columns)
    if hasattr(first, "dtype"):
        import torch

        return torch.cat(columns)
    return first.cat(columns)
