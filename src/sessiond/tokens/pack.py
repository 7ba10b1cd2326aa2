"""Packs tiktoken's published vocabularies into the files of `vocab/`: python -m sessiond.tokens.pack SRC DST.

It packs nothing whose sha256 is not the published one, and never runs in the daemon.

A packed file is zlib at level 9 of: one byte of length per token, in rank order, then all token bytes, in rank
order. Ranks are dense from 0, so that they need not be written.
"""

from __future__ import annotations

import base64
import hashlib
import sys
import zlib
from pathlib import Path

# From tiktoken_ext/openai_public.py of tiktoken 0.14.
PUBLISHED_SHA256 = {
    "o200k_base": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    "cl100k_base": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
}


def unpacked(published: bytes) -> bytes:
    """What a packed file holds before compression, from the bytes of a .tiktoken file.

    Raises ValueError where the ranks are not dense or a token is longer than 255 bytes: the layout can't say that.
    """
    tokens: list[bytes] = []
    for line in published.splitlines():
        token, rank = line.split()
        if int(rank) != len(tokens):
            raise ValueError(f"rank {int(rank)} stands where rank {len(tokens)} was due")
        tokens.append(base64.b64decode(token, validate=True))
    return bytes(map(len, tokens)) + b"".join(tokens)


def pack(name: str, published: bytes) -> bytes:
    """The packed file of the vocabulary `name`. Raises ValueError where `published` is not what tiktoken publishes."""
    found = hashlib.sha256(published).hexdigest()
    if found != PUBLISHED_SHA256[name]:
        raise ValueError(f"{name}: sha256 is {found}, published is {PUBLISHED_SHA256[name]}")
    return zlib.compress(unpacked(published), 9)


def main(arguments: list[str]) -> int:
    """Pack SRC/<name>.tiktoken into DST/<name>.vocab and print the sha256 that `tokens/__init__.py` pins."""
    if len(arguments) != 2:
        print("usage: python -m sessiond.tokens.pack SRC DST", file=sys.stderr)
        return 2
    source, target = Path(arguments[0]), Path(arguments[1])
    for name in PUBLISHED_SHA256:
        packed = pack(name, (source / f"{name}.tiktoken").read_bytes())
        (target / f"{name}.vocab").write_bytes(packed)
        print(f"{name} {len(packed)} bytes sha256 {hashlib.sha256(packed).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
