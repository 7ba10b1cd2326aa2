"""Making sessions: what a creation that was cut short leaves behind is finished by the next one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sessiond.core import manifest as manifests
from sessiond.core import rules
from sessiond.tiers.cloud.bucket import manifest_key, open_bucket
from sessiond.tiers.cloud.folder import FolderStore
from sessiond.tiers.hot.environment import Environment
from sessiond.tiers.hydrate import Claims, Node, first_manifest


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
