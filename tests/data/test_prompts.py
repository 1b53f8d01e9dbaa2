"""Rollout prompts from a file or from the data."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddil_dist.config import DataConfig
from ddil_dist.data.image_text import ImageTextData
from ddil_dist.data.prompts import load_prompts
from ddil_dist.errors import DataError
from tests.data.support import encoded, write_rows


def test_one_prompt_a_line_blank_lines_and_a_byte_order_mark_aside(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffa cat\r\n\n  一只猫 \n\t\nقطة\n".encode())
    assert load_prompts(DataConfig(prompts=file), None) == ["a cat", "一只猫", "قطة"]


def test_without_a_file_the_datas_captions_are_the_prompts(tmp_path: Path) -> None:
    config = write_rows(tmp_path / "d.parquet", [(encoded((1, 2, 3)), "one"), (b"broken", "two"), (None, "")])
    assert load_prompts(config, ImageTextData.open(config, image_size=8)) == ["one", "two"]


@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_a_file_without_prompts_is_a_data_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"data\.prompts: .*p\.txt has no prompts; write one a line"):
        load_prompts(DataConfig(prompts=file), None)


def test_an_unreadable_file_is_a_data_error(tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("grün".encode("latin-1"))
    for file in (latin, tmp_path / "nowhere.txt", tmp_path):
        with pytest.raises(DataError, match=r"data\.prompts: .* not a readable UTF-8 text file"):
            load_prompts(DataConfig(prompts=file), None)
