"""The buffer's Lua scripts, as a server gets them: with what they share, and what they are to know of the records."""

from __future__ import annotations

from functools import cache
from hashlib import sha1
from pathlib import Path
from typing import Any, Final

import numpy as np

SCRIPTS: Final = ("init", "insert", "admit", "sync", "charge", "use", "drop", "configure", "account")
FATEFUL: Final = ("insert", "charge", "use", "drop")
"""Scripts that write records or sample them."""
COUNTED_AS: Final = {"source": "s", "timestep": "t", "policy_version": "v"}
"""Under which names live records are counted; what is not here, under its own."""
_LUA_FORMATS: Final = {"u1": "B", "i1": "b", "u2": "H", "i2": "h", "u4": "I", "i4": "i"}


@cache
def script(name: str, meta: np.dtype[Any]) -> tuple[bytes, str]:
    """SHA-1 and text of a script of this package, what it shares with others in front.

    That is `common.lua`, with what it is to know of the records, and `fates.lua` where it writes or samples them.
    meta: `Codec.meta_dtype`.
    """
    folder, shared = Path(__file__).parent, ("fates",) if name in FATEFUL else ()
    parts = [(folder / f"{part}.lua").read_text(encoding="utf-8") for part in ("common", *shared, name)]
    text = "\n".join((_constants(meta), *parts))
    return sha1(text.encode()).hexdigest().encode(), text  # noqa: S324


def _constants(meta: np.dtype[Any]) -> str:
    """What `common.lua` is to know of the metadata, as Lua."""
    assert meta.fields is not None
    unpack, end, names = "<", 0, list(meta.fields)
    for name in names:
        dtype, begin = meta.fields[name][:2]
        unpack += "x" * (begin - end) + _LUA_FORMATS[dtype.str.lstrip("<|")]
        end = begin + dtype.itemsize
    counted = ", ".join(f"'{COUNTED_AS.get(name, name)}'" for name in names[:-1])
    return f"local META, UNPACK, COUNTED = {meta.itemsize}, '{unpack}', {{{counted}}}"
