"""The promises of sessiond.tokens: tiktoken's own counts, the counting rule to the letter, no network, no silence."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest
import tiktoken
import tiktoken_ext.openai_public as published
from hypothesis import given, settings
from hypothesis import strategies as st

from sessiond import errors, tokens
from sessiond.tokens import pack
from sessiond.v1 import turn_pb2

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
O200K = turn_pb2.ENCODING_O200K_BASE
CL100K = turn_pb2.ENCODING_CL100K_BASE
NAMES = {O200K: "o200k_base", CL100K: "cl100k_base"}
BOTH = pytest.mark.parametrize("encoding", [O200K, CL100K], ids=lambda encoding: NAMES[encoding])
PACKED_BYTES_MAX = 1_500_000
# The shortest run of whitespace that tiktoken 0.14 gives up on, found by bisection.
PANIC_RUN_CHARACTERS = 999_999


@pytest.fixture(scope="module")
def tokenizer() -> tokens.Tokenizer:
    return tokens.Tokenizer()


def raw_vocabulary(name: str) -> bytes:
    path = DATA / "vocab" / f"{name}.tiktoken"
    if not path.exists():
        pytest.skip(f"{path} is absent: only the packed vocabulary can be tested")
    return path.read_bytes()


def published_constructor(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What tiktoken itself would build the encoding from, its download replaced."""

    def ranks(url: str, expected_hash: str) -> dict[bytes, int]:
        raw = raw_vocabulary(name)
        assert hashlib.sha256(raw).hexdigest() == expected_hash == pack.PUBLISHED_SHA256[name]
        return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in raw.splitlines())}

    monkeypatch.setattr(published, "load_tiktoken_bpe", ranks)
    return published.ENCODING_CONSTRUCTORS[name]()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def reference() -> dict[int, tiktoken.Encoding]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return {
            encoding: tiktoken.Encoding(**published_constructor(name, monkeypatch))  # type: ignore[arg-type]
            for encoding, name in NAMES.items()
        }


# --- equality with tiktoken


@BOTH
def test_patterns_are_the_published_ones(encoding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    constructor = published_constructor(NAMES[encoding], monkeypatch)
    assert tokens.VOCABULARIES[encoding].pat_str == constructor["pat_str"]
    assert tokens.VOCABULARIES[encoding].name == constructor["name"]


@BOTH
def test_packed_file_holds_the_published_vocabulary_below_its_limit(encoding: int) -> None:
    packed = (tokens.VOCAB_DIR / f"{NAMES[encoding]}.vocab").read_bytes()
    assert len(packed) < PACKED_BYTES_MAX
    assert zlib.decompress(packed) == pack.unpacked(raw_vocabulary(NAMES[encoding]))


def test_pack_refuses_a_vocabulary_that_was_not_published() -> None:
    with pytest.raises(ValueError, match="sha256"):
        pack.pack("o200k_base", base64.b64encode(b"a") + b" 0\n")


def test_pack_refuses_ranks_with_a_gap() -> None:
    with pytest.raises(ValueError, match="rank 2 stands where rank 1 was due"):
        pack.unpacked(b"YQ== 0\nYg== 2\n")


def test_pack_writes_the_packaged_files_again(tmp_path: Path) -> None:
    raw_vocabulary("o200k_base")
    assert pack.main([str(DATA / "vocab"), str(tmp_path)]) == 0
    for name in NAMES.values():
        # Decompressed, for another zlib may compress to other bytes.
        assert zlib.decompress((tmp_path / f"{name}.vocab").read_bytes()) == zlib.decompress(
            (tokens.VOCAB_DIR / f"{name}.vocab").read_bytes()
        )


@BOTH
@settings(max_examples=400, deadline=None)
@given(text=st.one_of(st.text(max_size=300), st.text(alphabet="aA1 .,'\"\n\r\tslté中😀/|<>\u0301\u3000", max_size=300)))
def test_any_text_counts_as_tiktoken_counts_it(
    tokenizer: tokens.Tokenizer, reference: dict[int, tiktoken.Encoding], encoding: int, text: str
) -> None:
    assert tokenizer.count(text, encoding) == len(reference[encoding].encode_ordinary(text))


@BOTH
def test_real_conversations_count_as_tiktoken_counts_them(
    tokenizer: tokens.Tokenizer, reference: dict[int, tiktoken.Encoding], encoding: int
) -> None:
    path = DATA / "airline_conversations.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    texts: set[str] = set()
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            for message in json.loads(line)["messages"]:
                texts.add(message.get("content") or "")
                texts.update(call["function"]["arguments"] for call in message.get("tool_calls") or [])
    assert len(texts) > 3000
    for text in texts:
        assert tokenizer.count(text, encoding) == len(reference[encoding].encode_ordinary(text))


# Figures that anybody can repeat with tiktoken; they hold where the raw vocabularies are absent.
@pytest.mark.parametrize(
    ("text", "o200k", "cl100k"),
    [
        ("", 0, 0),
        ("hello world", 2, 2),
        ("tiktoken is great!", 6, 6),
        ("antidisestablishmentarianism", 6, 6),
        ("お誕生日おめでとう", 8, 9),
        ("2 + 2 = 4", 7, 7),
        ("<|endoftext|>", 7, 7),
    ],
)
def test_known_texts_count_as_published(tokenizer: tokens.Tokenizer, text: str, o200k: int, cl100k: int) -> None:
    assert (tokenizer.count(text, O200K), tokenizer.count(text, CL100K)) == (o200k, cl100k)


# --- the counting rule, row by row

# Each of these is one token in both encodings.
ONE = "hello"


def text_part(text: str = ONE) -> turn_pb2.Part:
    return turn_pb2.Part(text=text)


def opaque(data: bytes, declared: int = 0) -> turn_pb2.Part:
    return turn_pb2.Part(opaque=turn_pb2.OpaqueItem(origin="x.y", data=data, tokens=declared))


def result(*parts: turn_pb2.Part, call_id: str = "call_0123456789") -> turn_pb2.Part:
    return turn_pb2.Part(tool_result=turn_pb2.ToolResult(call_id=call_id, parts=parts))


RULE_ROWS: dict[str, tuple[turn_pb2.Message, int]] = {
    "a message without parts is 4": (turn_pb2.Message(), 4),
    "a text adds T(text)": (turn_pb2.Message(parts=[text_part()]), 4 + 1),
    "an empty text adds nothing": (turn_pb2.Message(parts=[text_part("")]), 4),
    "parts are counted one by one": (turn_pb2.Message(parts=[text_part("hel"), text_part("lo")]), 4 + 2),
    "a refusal adds T(text)": (turn_pb2.Message(parts=[turn_pb2.Part(refusal=ONE)]), 4 + 1),
    "a name adds 1 and T(name)": (turn_pb2.Message(name=ONE, parts=[text_part()]), 4 + 1 + 1 + 1),
    "a call adds 3, T(name), T(arguments), not its id": (
        turn_pb2.Message(
            parts=[turn_pb2.Part(tool_call=turn_pb2.ToolCall(call_id="call_0123456789", name=ONE, arguments=ONE))]
        ),
        4 + 3 + 1 + 1,
    ),
    "a result adds its parts, not its id": (turn_pb2.Message(parts=[result(text_part(), text_part())]), 4 + 2),
    "an empty result adds nothing": (turn_pb2.Message(parts=[result()]), 4),
    "a result's parts follow the same table": (
        turn_pb2.Message(parts=[result(turn_pb2.Part(refusal=ONE), opaque(b"\xff" * 4), opaque(b"x", 9))]),
        4 + 1 + 2 + 9,
    ),
    "an attachment adds its declared tokens and T(alt)": (
        turn_pb2.Message(
            parts=[turn_pb2.Part(attachment=turn_pb2.Attachment(uri="https://a/b.png", tokens=85, alt_text=ONE))]
        ),
        4 + 85 + 1,
    ),
    "an opaque item with declared tokens adds those": (turn_pb2.Message(parts=[opaque(b"hello hello", 7)]), 4 + 7),
    "an opaque item of UTF-8 adds T(data)": (turn_pb2.Message(parts=[opaque(ONE.encode())]), 4 + 1),
    "an opaque item of 3 bytes adds 1": (turn_pb2.Message(parts=[opaque(b"\xff" * 3)]), 4 + 1),
    "an opaque item of 4 bytes adds 2": (turn_pb2.Message(parts=[opaque(b"\xff" * 4)]), 4 + 2),
    "an empty opaque item adds nothing": (turn_pb2.Message(parts=[opaque(b"")]), 4),
    "extra and original JSON are not counted": (
        turn_pb2.Message(
            parts=[turn_pb2.Part(text=ONE, extra_json=b'{"a":1}')], extra_json=b'{"b":2}', original_json=b'{"c":3}'
        ),
        4 + 1,
    ),
    "special tokens are ordinary text": (turn_pb2.Message(parts=[text_part("<|endoftext|>")]), 4 + 7),
}


@BOTH
@pytest.mark.parametrize("row", RULE_ROWS, ids=str)
def test_counting_rule_of_a_message(tokenizer: tokens.Tokenizer, encoding: int, row: str) -> None:
    message, expected = RULE_ROWS[row]
    assert tokenizer.count_message(message, encoding) == expected


@BOTH
def test_counting_rule_of_pins_summaries_and_framing(tokenizer: tokens.Tokenizer, encoding: int) -> None:
    assert tokenizer.count_pin(ONE, "hello hello", encoding) == 2 + 1 + 2
    assert tokenizer.count_pin(ONE, "", encoding) == 2 + 1
    assert tokenizer.count_summary("hello hello", encoding) == 4 + 2
    assert tokens.CONTEXT_TOKENS == 3


def test_an_encoding_that_names_none_is_refused(tokenizer: tokens.Tokenizer) -> None:
    with pytest.raises(ValueError, match="0 names no encoding"):
        tokenizer.count(ONE, turn_pb2.ENCODING_UNSPECIFIED)


# --- damage


def vocab_copy(folder: Path) -> Path:
    for name in NAMES.values():
        (folder / f"{name}.vocab").write_bytes((tokens.VOCAB_DIR / f"{name}.vocab").read_bytes())
    return folder


@BOTH
@pytest.mark.parametrize("damage", ["one bit", "truncated", "empty", "missing"])
def test_a_damaged_vocabulary_is_named_at_start_and_at_load(tmp_path: Path, encoding: int, damage: str) -> None:
    damaged = tokens.Tokenizer(vocab_copy(tmp_path))
    damaged.verify_vocabularies()
    path = tmp_path / f"{NAMES[encoding]}.vocab"
    content = path.read_bytes()
    if damage == "one bit":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    for attempt in (damaged.verify_vocabularies, damaged.warm, lambda: damaged.count(ONE, encoding)):
        with pytest.raises(errors.Corrupt) as caught:
            attempt()
        assert caught.value.reason == "DAMAGED_VOCABULARY"
        assert caught.value.metadata == {"file": str(path)}
        assert str(path) in str(caught.value)


def test_the_other_vocabulary_counts_on_beside_a_damaged_one(tmp_path: Path) -> None:
    (vocab_copy(tmp_path) / "o200k_base.vocab").write_bytes(b"")
    assert tokens.Tokenizer(tmp_path).count(ONE, CL100K) == 1


# --- what tiktoken gives up on


@BOTH
def test_a_text_that_tiktoken_panics_on_is_a_named_invalid(tokenizer: tokens.Tokenizer, encoding: int) -> None:
    text = " " * PANIC_RUN_CHARACTERS + "a"
    with pytest.raises(errors.Invalid) as caught:
        tokenizer.count_message(turn_pb2.Message(parts=[text_part(text)]), encoding)
    assert caught.value.reason == "TOKENIZER_FAILED"
    assert caught.value.metadata["text_characters"] == str(len(text))
    assert str(len(text)) in str(caught.value)
    # The panic leaves nothing behind, and one character less still counts.
    assert tokenizer.count(ONE, encoding) == 1
    assert tokenizer.count(text[1:], encoding) > 0


class Gives:
    """Stands for a loaded encoding; raises what it is told to."""

    def __init__(self, failure: BaseException) -> None:
        self.failure = failure

    def encode_ordinary(self, text: str) -> list[int]:
        raise self.failure


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError])
def test_what_is_not_the_tokenizers_failure_passes_through(kind: type[BaseException]) -> None:
    interrupted = tokens.Tokenizer()
    interrupted._loaded[O200K] = Gives(kind())  # type: ignore[assignment]
    with pytest.raises(kind):
        interrupted.count(ONE, O200K)


# --- loading


def test_threads_that_count_at_once_load_each_vocabulary_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tokens.Tokenizer()
    built: list[str] = []
    build = shared._build
    monkeypatch.setattr(shared, "_build", lambda vocabulary: (built.append(vocabulary.name), build(vocabulary))[1])
    together = threading.Barrier(8)
    counts: list[int] = []

    def count() -> None:
        together.wait()
        counts.append(shared.count(ONE, O200K))

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [1] * 8
    assert built == ["o200k_base"]


def test_counting_opens_no_socket_and_no_cache_folder(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    script = f"""
import sys
allowed = {str(tokens.VOCAB_DIR)!r}
def audit(event, arguments):
    if event.startswith("socket.") or event in ("subprocess.Popen", "os.mkdir", "os.rename", "os.remove"):
        raise RuntimeError("tokens tried " + event)
    if event == "open" and str(arguments[0]).startswith({str(cache)!r}):
        raise RuntimeError("tokens opened the cache folder")
sys.addaudithook(audit)
import os
from sessiond.tokens import Tokenizer
tokenizer = Tokenizer()
tokenizer.verify_vocabularies()
tokenizer.warm()
assert tokenizer.count("hello world", 1) == tokenizer.count("hello world", 2) == 2
try:
    import socket
    socket.create_connection(("127.0.0.1", 9))
except RuntimeError as seen:
    print("armed:", seen)
"""
    ran = subprocess.run(
        [sys.executable, "-B", "-c", script],
        env={
            "PYTHONPATH": str(Path(tokens.__file__).resolve().parents[2]),
            "TIKTOKEN_CACHE_DIR": str(cache),
            "TMPDIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("armed: tokens tried socket."), ran.stdout
    assert not cache.exists()
