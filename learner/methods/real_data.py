"""Data latents for a discriminator: a stream of its own, whose position follows from the update."""

from __future__ import annotations

from torch import Tensor

from ddil_dist.data.forward import ForwardData
from ddil_dist.models.conditioning import Conditioning, PromptEncoder


class RealData:
    """Captioned latents in a seeded order, `rows` of them a turn; a resumed run goes on where the order was."""

    def __init__(self, data: ForwardData, encoder: PromptEncoder, *, rows: int) -> None:
        self._data = data
        self._encoder = encoder
        self._rows = rows

    def seek(self, turn: int) -> None:
        """The next row is the first of a turn, counted from 0."""
        position = turn * self._rows
        if self._data.state_dict()["position"] != position:
            self._data.load_state_dict({"position": position})

    def next(self, num: int) -> tuple[Tensor, Conditioning]:
        """The next x_0 [num, C, H, W] float32 and their encoded captions."""
        x_0, captions = self._data.next(num)
        return x_0, self._encoder.encode(captions)
