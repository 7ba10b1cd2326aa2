"""Making sessions: what a creation that was cut short leaves behind is finished by the next one."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from sessiond.core import manifest as manifests
from sessiond.core import rules
from sessiond.core.manifest import LIFECYCLE_DELETED
from sessiond.tiers.cloud.bucket import manifest_key, open_bucket
from sessiond.tiers.cloud.folder import FolderStore
from sessiond.tiers.hot.environment import Environment
from sessiond.tiers.hydrate import Claims, Node, first_manifest, load
from sessiond.tiers.retire import ended


def test_a_creation_that_was_cut_short_after_its_manifest_is_listed_once_it_is_repeated(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "cloud")
    bucket = open_bucket(store, b"", 0)
    hot = Environment(tmp_path / "hot", 64 * 1024**2, 64, 8)
    node = Node(hot.incarnation, "n1", "")
    claims = Claims(hot, store, bucket, node, lambda _: None)
    try:
        h = rules.session_hash(bucket.hash_key, "default", "s")
        birth = {"created_ms": 1, "metadata": {}}
        first = first_manifest(node, "default", "s", "ada", h, birth, {}, 1)
        # All that the killed daemon came to: its row in the index was in flight.
        store.put(manifest_key(h), manifests.seal(first), if_absent=True)
        assert claims.create(replace(first, birth={**birth, "created_ms": 2}))
        listed = [row.key for row in store.list(bucket.user_prefix("default", "ada"))]
        assert bucket.user_index_key("default", "ada", 1, h) in listed
    finally:
        claims.close()
        hot.close()
        store.close()


class _LateIndex(FolderStore):
    """A folder that holds back the row of the index by user until it is told to let it go."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.asked, self.go = threading.Event(), threading.Event()

    def put(self, key: str, body: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        if key.startswith("u/"):
            self.asked.set()
            assert self.go.wait(20)
        return super().put(key, body, if_absent=if_absent, if_match=if_match)


def test_a_session_that_was_deleted_while_it_was_made_leaves_no_row_in_the_index(tmp_path: Path) -> None:
    store = _LateIndex(tmp_path / "cloud")
    bucket = open_bucket(store, b"", 0)
    hot = Environment(tmp_path / "hot", 64 * 1024**2, 64, 8)
    node = Node(hot.incarnation, "n1", "")
    claims = Claims(hot, store, bucket, node, lambda _: None)
    try:
        h = rules.session_hash(bucket.hash_key, "default", "s")
        first = first_manifest(node, "default", "s", "ada", h, {"created_ms": 1, "metadata": {}}, {}, 1)
        with ThreadPoolExecutor(1) as maker:
            made = maker.submit(claims.create, first)
            assert store.asked.wait(20)
            # Another device found it and deleted it, through a node that holds nothing of it.
            while (found := load(store, h)) is None:
                time.sleep(0.001)
            end = ended(found.manifest, bytes(16), LIFECYCLE_DELETED, None, 2)
            store.put(manifest_key(h), manifests.seal(end), if_match=found.etag)
            claims.note_deleted(h)
            store.go.set()
            made.result(20)
        assert list(store.list("u/")) == []
    finally:
        claims.close()
        hot.close()
        store.close()
