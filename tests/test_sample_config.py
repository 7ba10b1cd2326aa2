"""sessiond.toml at the top of the project names every setting, with the default that the code has."""

from __future__ import annotations

import tomllib
from pathlib import Path

from sessiond import config

SAMPLE = Path(__file__).resolve().parents[1] / "sessiond.toml"


def test_the_sample_configuration_is_the_defaults() -> None:
    assert config.load(str(SAMPLE), {}, {}) == config.Settings()


def test_the_sample_configuration_names_every_setting_with_a_comment_above_it() -> None:
    lines = SAMPLE.read_text().splitlines()
    named = set(tomllib.loads(SAMPLE.read_text())) | {"s3_path_style"}
    assert named == set(config.Settings.__struct_fields__)
    for number, line in enumerate(lines):
        if line and not line.startswith("#"):
            above = next(text for text in reversed(lines[:number]) if not text or text.startswith("#"))
            assert above.startswith("#"), f"line {number + 1} stands without a comment"
