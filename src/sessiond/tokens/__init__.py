"""Exact token counts by the counting rule of turn.proto, as tiktoken counts them, from vocabularies in the package.

It never touches the network or a cache folder, never estimates, and never gives special tokens a meaning.
"""

from __future__ import annotations

import hashlib
import threading
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from sessiond import errors
from sessiond.v1 import turn_pb2

if TYPE_CHECKING:
    import tiktoken

# The counting rule, head of turn.proto.
MESSAGE_TOKENS = 4
CALL_TOKENS = 3
CONTEXT_TOKENS = 3
PIN_TOKENS = 2
NAME_TOKENS = 1
OPAQUE_BYTES_PER_TOKEN = 3

VOCAB_DIR = Path(__file__).parent / "vocab"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """One encoding: its packed file, what that file's sha256 must be, and how text is split before merging."""

    name: str
    size_tokens: int
    packed_sha256: str
    pat_str: str


# Patterns as published in tiktoken_ext/openai_public.py, tiktoken 0.14; sha256 as printed by sessiond.tokens.pack.
VOCABULARIES: dict[int, Vocabulary] = {
    turn_pb2.ENCODING_O200K_BASE: Vocabulary(
        name="o200k_base",
        size_tokens=199_998,
        packed_sha256="815ad0c59958aa18ac2136a9d9ac315c38394f2584aefdc5e2aa426fb96722c4",
        pat_str="|".join(
            [
                (
                    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"""
                    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
                ),
                (
                    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"""
                    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
                ),
                r"""\p{N}{1,3}""",
                r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
                r"""\s*[\r\n]+""",
                r"""\s+(?!\S)""",
                r"""\s+""",
            ]
        ),
    ),
    turn_pb2.ENCODING_CL100K_BASE: Vocabulary(
        name="cl100k_base",
        size_tokens=100_256,
        packed_sha256="b65cdaaedbfd77b3b19f247b231a5461f9fc4f51209606d33d523f78cc07288b",
        pat_str=(
            r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"""
            r"""|\s*[\r\n]|\s+(?!\S)|\s"""
        ),
    ),
}


class Tokenizer:
    """Counts tokens. Safe to share between threads; a vocabulary is loaded once, by the first count that needs it.

    `encoding` is always a sessiond.v1.Encoding that names one; ValueError otherwise, for the caller resolves "not
    said". Every method raises Corrupt(DAMAGED_VOCABULARY) where a packed file is missing or is not the one that was
    packed, and the counts raise Invalid(TOKENIZER_FAILED) where tiktoken gives up on a text.
    """

    def __init__(self, vocab_dir: Path = VOCAB_DIR) -> None:
        self._vocab_dir = vocab_dir
        self._lock = threading.Lock()
        self._loaded: dict[int, tiktoken.Encoding] = {}

    def count(self, text: str, encoding: int) -> int:
        """T(text): the tokens of one string, alone."""
        # tiktoken releases the GIL while it splits and merges (two threads on 1 MiB each took 1.2x the time of one
        # thread on one, on two cores), so a long text does not hold up the other threads of the process.
        # Time is linear in the text: 1 MiB of the worst kind found, random lower-case letters, takes 0.3 to 0.5 s.
        loaded = self._loaded.get(encoding) or self._load(encoding)
        try:
            return len(loaded.encode_ordinary(text))
        except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
            raise
        except BaseException as failure:
            # A run of 999,999 whitespace characters exhausts the regex engine's backtracking stack; pyo3 turns that
            # panic into a BaseException (openai/tiktoken issue 15), which would otherwise end the worker.
            raise errors.Invalid(
                "TOKENIZER_FAILED",
                f"{VOCABULARIES[encoding].name} cannot count a text of {len(text)} characters: {failure}.",
                metadata={"encoding": VOCABULARIES[encoding].name, "text_characters": str(len(text))},
            ) from failure

    def count_message(self, message: turn_pb2.Message, encoding: int) -> int:
        """The tokens of a message: its frame, its name and its parts."""
        if len(message.parts) == 1 and not message.name and (text := message.parts[0].text):
            return MESSAGE_TOKENS + self.count(text, encoding)  # as most are
        named = NAME_TOKENS + self.count(message.name, encoding) if message.name else 0
        return MESSAGE_TOKENS + named + self._count_parts(message.parts, encoding)

    def count_summary(self, text: str, encoding: int) -> int:
        """The tokens of a message whose only part is `text`: a summary, or instructions that the caller gave."""
        return MESSAGE_TOKENS + self.count(text, encoding)

    def count_pin(self, key: str, value: str, encoding: int) -> int:
        """The tokens of a pinned fact."""
        return PIN_TOKENS + self.count(key, encoding) + self.count(value, encoding)

    def verify_vocabularies(self) -> None:
        """Check the sha256 of every packed file and load none: about a millisecond, for the daemon's start."""
        for vocabulary in VOCABULARIES.values():
            self._read(vocabulary)

    def warm(self) -> None:
        """Load every vocabulary now: about 0.25 s and 110 MB in all."""
        for encoding in VOCABULARIES:
            self._load(encoding)

    def _count_parts(self, parts: Iterable[turn_pb2.Part], encoding: int) -> int:
        return sum(self._count_part(part, encoding) for part in parts)

    def _count_part(self, part: turn_pb2.Part, encoding: int) -> int:
        match part.WhichOneof("kind"):
            case "text":
                return self.count(part.text, encoding)
            case "refusal":
                return self.count(part.refusal, encoding)
            case "tool_call":
                call = part.tool_call
                return CALL_TOKENS + self.count(call.name, encoding) + self.count(call.arguments, encoding)
            case "tool_result":
                return self._count_parts(part.tool_result.parts, encoding)
            case "attachment":
                return part.attachment.tokens + self.count(part.attachment.alt_text, encoding)
            case "opaque":
                return self._count_opaque(part.opaque, encoding)
            case _:
                # A kind that a newer caller knows: nothing of it would be rendered from here either.
                return 0

    def _count_opaque(self, item: turn_pb2.OpaqueItem, encoding: int) -> int:
        if item.tokens:
            return item.tokens
        try:
            text = item.data.decode("utf-8")
        except UnicodeDecodeError:
            return -(-len(item.data) // OPAQUE_BYTES_PER_TOKEN)
        return self.count(text, encoding)

    def _load(self, encoding: int) -> tiktoken.Encoding:
        if encoding not in VOCABULARIES:
            raise ValueError(f"{encoding} names no encoding")
        with self._lock:
            loaded = self._loaded.get(encoding)
            if loaded is None:
                loaded = self._loaded[encoding] = self._build(VOCABULARIES[encoding])
            return loaded

    def _build(self, vocabulary: Vocabulary) -> tiktoken.Encoding:
        # Here, not at the top: verify_vocabularies runs before a restarted daemon serves and does not need it.
        import tiktoken

        content = zlib.decompress(self._read(vocabulary))
        size = vocabulary.size_tokens
        ends = accumulate(content[:size], initial=size)
        start = next(ends)
        ranks: dict[bytes, int] = {}
        for rank, end in enumerate(ends):
            ranks[content[start:end]] = rank
            start = end
        # Not tiktoken.get_encoding: that one downloads, and deletes a cached file that it does not like.
        return tiktoken.Encoding(vocabulary.name, pat_str=vocabulary.pat_str, mergeable_ranks=ranks, special_tokens={})

    def _read(self, vocabulary: Vocabulary) -> bytes:
        path = self._vocab_dir / f"{vocabulary.name}.vocab"
        try:
            packed = path.read_bytes()
        except OSError as failure:
            raise self._damaged(path, f"can't be read: {failure.strerror}") from failure
        found = hashlib.sha256(packed).hexdigest()
        if found != vocabulary.packed_sha256:
            raise self._damaged(path, f"has sha256 {found}, not {vocabulary.packed_sha256}")
        return packed

    @staticmethod
    def _damaged(path: Path, what: str) -> errors.Corrupt:
        return errors.Corrupt("DAMAGED_VOCABULARY", f"{path} {what}.", metadata={"file": str(path)})
