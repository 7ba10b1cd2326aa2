"""Refuse a store that does not keep conditional writes, before a session depends on them. Probes a bucket once."""

from __future__ import annotations

from typing import Final

from sessiond.tiers.cloud.bucket import start_refusal
from sessiond.tiers.cloud.probe import probe
from sessiond.tiers.cloud.store import ObjectNotFound, ObjectStore, StoreError

# Rises when the probe learns to ask for more.
PASSED_KEY: Final = "probe/passed-1"


def ensure_fit(store: ObjectStore) -> None:
    """Probe the store unless this bucket passed before. Raises Invalid STORE_UNFIT, and as the store does."""
    try:
        try:
            store.get(PASSED_KEY)
        except ObjectNotFound:
            probe(store)
            store.put(PASSED_KEY, b"1\n")
    except StoreError as error:
        raise start_refusal(error) from error
