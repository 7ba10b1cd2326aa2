"""Lines in and out: what is a conversation, what is not and why, and names that never change."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import sys
from contextlib import closing
from pathlib import Path

import pytest

from sessiond.cli import lines
from sessiond.cli.lines import Conversation, Malformed, Source, TurnIds, first_time_ms, parse, session_id_of
from sessiond.errors import Invalid
from tests.cli.generated import messages


def parsed(line: object) -> Conversation:
    return parse(json.dumps(line).encode(), "f:1", "f-1")


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"nonsense", "it is not JSON: Expecting value at character 0"),
        (b'{"messages": [}', "it is not JSON"),
        (b'{"messages": [NaN]}', "NaN is no JSON number"),
        (b'{"messages": [1e999]}', "1e999 is too large a number"),
        (b"[" * 100_000, "it is not JSON"),
        (b'"text"', "neither an object nor a list"),
        (b"3", "neither an object nor a list"),
        (b"{}", '"messages" is missing'),
        (b'{"messages": {}}', '"messages" is not a list'),
        (b'{"id": [], "messages": []}', '"id" is neither'),
        (b'{"id": true, "messages": []}', '"id" is neither'),
        (b'{"id": "\\ud800", "messages": []}', "lone surrogate"),
        (b'{"id": "a", "user": "\\ud800", "messages": []}', "lone surrogate"),
        (b'{"id": "a", "metadata": {"k": "\\ud800"}, "messages": []}', "lone surrogate"),
        (b'{"id": "a", "title": "\\ud800", "messages": []}', "lone surrogate"),
        (b'{"id": "\xff"}', "byte 8 of the line is not UTF-8"),
    ],
)
def test_a_line_that_is_no_conversation_is_refused_with_its_place(raw: bytes, what: str) -> None:
    with pytest.raises(Invalid) as refused:
        parse(raw, "some/file:12", "x")
    assert refused.value.reason == "INVALID_INPUT_FILE"
    assert refused.value.message.startswith("some/file:12: ")
    assert what in refused.value.message


def test_a_plain_list_is_named_after_file_and_line_however_it_is_packed(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf[{"role":"user","content":"a"}]\n\n  \n[]\r\n'
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    for name in ("a.jsonl", "a.jsonl.gz"):
        source = Source(str(tmp_path / name))
        found = [line for line in source if isinstance(line, Conversation)]
        source.close()
        assert [(line.key, line.place) for line in found] == [
            ("a.jsonl-1", f"{tmp_path / name}:1"),
            ("a.jsonl-4", f"{tmp_path / name}:4"),
        ]


def test_standard_input_may_be_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Input:
        buffer = io.BufferedReader(io.BytesIO(gzip.compress(b'{"id": "a", "messages": []}\n')))

    monkeypatch.setattr(sys, "stdin", Input())
    (line,) = Source("-")
    assert isinstance(line, Conversation)
    assert (line.key, line.place) == ("a", "stdin:1")


def test_a_damaged_archive_names_the_line_that_it_ends_in(tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(b'{"id": "%d", "messages": []}\n' % n for n in range(1000)))
    (tmp_path / "cut.gz").write_bytes(packed[: len(packed) // 2])
    source = Source(str(tmp_path / "cut.gz"))
    read: list[object] = []
    with closing(source), pytest.raises(Invalid) as refused:
        read.extend(iter(source))
    assert refused.value.reason == "INVALID_INPUT_FILE"
    assert refused.value.message.startswith(f"{tmp_path}/cut.gz:{len(read) + 1}: it can't be read on")


def test_a_line_over_the_limit_is_skipped_and_the_next_one_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "LINE_BYTES_MAX", 100)
    good = '{"id": "a", "messages": []}\n'
    (tmp_path / "f").write_text(good + "x" * 5000 + "\n" + good + "y" * 101)
    source = Source(str(tmp_path / "f"))
    kinds = [type(line) for line in source]
    source.close()
    assert kinds == [Conversation, Malformed, Conversation, Malformed]


def test_a_session_id_is_the_conversation_id_where_it_can_be_and_made_from_it_where_not() -> None:
    allowed = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")
    assert session_id_of("", "airline-000-0") == "airline-000-0"
    assert session_id_of("p:", "a@b.c_d-1") == "p:a@b.c_d-1"
    odd = ["a b", "a/b", "a_b", "é", "-a", "x" * 128, "x" * 129, "x" * 130, "🙂", "a\nb", " ", "…"]
    made = [session_id_of("", key) for key in odd]
    assert len(set(made)) == len(odd)
    assert all(allowed.fullmatch(session_id) for session_id in made)
    assert made == [session_id_of("", key) for key in odd]
    assert made[0] == "a_b-c8687a08aa5d6ed2"


def test_a_turn_id_stands_for_every_message_before_it() -> None:
    talk = messages(random.Random(1), 6)
    first, second = TurnIds("s"), TurnIds("s")
    assert [first.next(message) for message in talk] == [
        second.next(dict(reversed(message.items()))) for message in talk
    ]
    changed = [{**talk[0], "content": "another"}, *talk[1:]]
    assert not {TurnIds("s").next(m) for m in talk[:1]} & {TurnIds("t").next(m) for m in talk[:1]}
    third, fourth = TurnIds("s"), TurnIds("s")
    assert not {third.next(message) for message in talk} & {fourth.next(message) for message in changed}
    assert first.next({"content": "\ud800"})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1_700_000_000, 1_700_000_000_000),
        (1_700_000_000.5, 1_700_000_000_500),
        (1_700_000_000_123, 1_700_000_000_123),
        ("2023-11-14T22:13:20Z", 1_700_000_000_000),
        ("2023-11-14T22:13:20", 1_700_000_000_000),
        ("2023-11-14T23:13:20.250+01:00", 1_700_000_000_250),
        ("yesterday", 0),
        (True, 0),
        (None, 0),
        (-5, 0),
        (0, 0),
        (10**400, 0),
        ("0001-01-01", 0),
    ],
)
def test_times_are_read_as_they_are_usually_written(value: object, expected: int) -> None:
    assert first_time_ms({"created_at": value}) == expected
    assert first_time_ms({"created": value, "created_at": "?"}) == expected


def test_fields_too_large_to_keep_are_named() -> None:
    line = parsed({"id": "a", "messages": [], "small": 1, "large": "x" * lines.KEPT_BYTES_MAX, "after": 2})
    assert line.dropped == ["large"]
    assert line.kept == {"small": 1, "after": 2}
