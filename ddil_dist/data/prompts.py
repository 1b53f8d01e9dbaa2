"""The prompts that rollouts start from: a text file, or the captions of the data."""

from __future__ import annotations

from ddil_dist.config import DataConfig
from ddil_dist.data.image_text import ImageTextData
from ddil_dist.errors import DataError


def load_prompts(config: DataConfig, data: ImageTextData | None) -> list[str]:
    """The configured prompts; raises DataError if there are none."""
    if config.prompts is None:
        assert data is not None
        return data.captions()
    try:
        lines = config.prompts.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.prompts: {config.prompts} is not a readable UTF-8 text file: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"data.prompts: {config.prompts} has no prompts; write one a line")
    return prompts
