"""The instrument itself: it fails as it says, before or after, and the same seed fails the same requests."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import closing

import pytest

from sessiond.tiers.cloud.s3 import S3Store
from sessiond.tiers.cloud.store import Ambiguous, Listed, ObjectNotFound, StoreError, StoreUnavailable
from tests.fault.proxy import (
    AFTER,
    BEFORE,
    CUT,
    CUT_REQUEST,
    PASS,
    RESET,
    SILENCE,
    STATUSES,
    SWALLOW,
    Asked,
    Fault,
    Proxy,
    Schedule,
    running_proxy,
    stable,
)
from tests.fault.world import environment
from tests.seaweed import Seaweed

READ_TIMEOUT_MS = 1000
WHATS = (*STATUSES, SILENCE, RESET, SWALLOW, CUT)


@pytest.fixture
def stores(seaweed: Seaweed) -> Iterator[tuple[Proxy, S3Store, S3Store]]:
    """The proxy, the store through it, and the same store past it."""
    prefix = f"proxy-{secrets.token_hex(8)}"
    keys = {"AWS_ACCESS_KEY_ID": seaweed.access_key, "AWS_SECRET_ACCESS_KEY": seaweed.secret_key}
    with environment(keys), running_proxy(seaweed.endpoint, seaweed.bucket, prefix) as proxy:
        options = {"path_style": True, "read_timeout_ms": READ_TIMEOUT_MS}
        with (
            closing(S3Store(seaweed.bucket, prefix, endpoint=proxy.endpoint, **options)) as through,
            closing(S3Store(seaweed.bucket, prefix, endpoint=seaweed.endpoint, **options)) as past,
        ):
            yield proxy, through, past


def test_what_passes_is_what_the_store_says(stores: tuple[Proxy, S3Store, S3Store]) -> None:
    _, through, past = stores
    for size in (0, 1, 70_000, 4 << 20):
        body = secrets.token_bytes(size)
        etag = through.put("s/1/1-1-1", body)
        assert through.get("s/1/1-1-1") == past.get("s/1/1-1-1")
        assert past.get("s/1/1-1-1").etag == etag
    assert through.get("s/1/1-1-1", 10, 19).body == body[10:20]
    assert list(through.list("s/")) == [Listed("s/1/1-1-1", 4 << 20)]
    through.delete("s/1/1-1-1")
    with pytest.raises(ObjectNotFound):
        through.get("s/1/1-1-1")


@pytest.mark.parametrize("what", WHATS)
def test_a_put_that_fails_before_is_not_applied_and_one_that_fails_after_is(
    stores: tuple[Proxy, S3Store, S3Store], what: str
) -> None:
    proxy, through, past = stores
    for when in (BEFORE, AFTER):
        proxy.rule = lambda _, when=when: Fault(what, when)
        with pytest.raises(StoreError):
            through.put(f"m/{when}", b"body", if_absent=True)
        with pytest.raises(StoreError):
            through.get(f"m/{when}")
    with pytest.raises(ObjectNotFound):
        past.get(f"m/{BEFORE}")
    assert past.get(f"m/{AFTER}").body == b"body"


def test_half_a_body_is_not_applied(stores: tuple[Proxy, S3Store, S3Store]) -> None:
    proxy, through, past = stores
    past.put("m/1", b"old")
    proxy.rule = lambda _: Fault(CUT_REQUEST)
    with pytest.raises(Ambiguous):
        through.put("m/1", b"new" * 1000)
    assert past.get("m/1").body == b"old"


def test_down_refuses_a_black_hole_is_silent_and_up_answers_again(stores: tuple[Proxy, S3Store, S3Store]) -> None:
    proxy, through, past = stores
    etag = past.put("m/1", b"one")
    for _ in range(3):
        proxy.down()
        # A connection that was kept may take the request before it learns that it was reset.
        with pytest.raises((StoreUnavailable, Ambiguous), match=r"EndpointConnectionError|ConnectionClosed|[Rr]eset"):
            through.put("m/1", b"two", if_match=etag)
        proxy.up()
        assert through.get("m/1").body == b"one"
        proxy.black_hole()
        with pytest.raises(Ambiguous, match=r"[Tt]imeout"):
            through.put("m/1", b"two", if_match=etag)
        proxy.up()
        assert through.get("m/1").body == b"one"


def test_the_same_seed_fails_the_same_requests_whatever_comes_between() -> None:
    faults = tuple(Fault(what, when) for what in WHATS for when in (BEFORE, AFTER))
    asked = [Asked(method, f"m/{key}", n) for method in ("GET", "PUT") for key in range(20) for n in range(20)]
    first, again, other = (Schedule(seed, 0.2, faults) for seed in (7, 7, 8))
    told = {each: first(each) for each in asked}
    assert told == {each: again(each) for each in reversed(asked)}
    assert told != {each: other(each) for each in asked}
    failed = [fault for fault in told.values() if fault != PASS]
    assert 0.1 * len(asked) < len(failed) < 0.3 * len(asked)
    assert set(failed) == set(faults)


def test_every_decision_is_written_down_by_what_is_the_same_in_every_run(
    stores: tuple[Proxy, S3Store, S3Store],
) -> None:
    proxy, through, _ = stores
    proxy.rule = Schedule(3, 0.5, (Fault("500"), Fault("500", AFTER)))
    for _ in range(20):
        for key in ("m/1", "m/2"):
            try:
                through.put(key, b"body")
            except Ambiguous:
                continue
    plan = Schedule(3, 0.5, (Fault("500"), Fault("500", AFTER)))
    numbered = [Asked("PUT", key, n) for n in range(20) for key in ("m/1", "m/2")]
    assert proxy.log == [(asked, plan(asked)) for asked in numbered]
    assert stable("s/aa/00000001-0000000000000001-5ha") == "s/aa/00000001-0000000000000001"
    assert stable("u/t/u/0123456789ab-aa") == "u/t/u/aa"
    assert stable("m/aa") == "m/aa"
