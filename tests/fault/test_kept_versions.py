"""A whole life in a bucket that keeps every version, and in one that lets nothing be destroyed."""

from __future__ import annotations

from contextlib import closing

import pytest
from botocore.exceptions import ClientError

from sessiond.tiers.cloud.bucket import segment_key
from sessiond.v1 import admin_pb2
from tests.fault.load import Load
from tests.fault.world import CLOUD_ACK, completed, faulty, hash_of
from tests.seaweed import Seaweed, make_bucket, s3_client
from tests.wire import CLOUD, HOT, assistant, refusal, user

BUCKETS = {"versioned": {"versioned": True}, "locked": {"locked": True}}


@pytest.mark.parametrize("kind", BUCKETS)
def test_a_whole_life_in_a_bucket_that_keeps_every_version(seaweed: Seaweed, kind: str) -> None:
    sessions = [f"s{number}" for number in range(4)]
    bucket = make_bucket(seaweed, kind, **BUCKETS[kind])
    with faulty(seaweed, bucket=bucket, store_read_timeout_ms=10_000) as world, closing(world.wire()) as wire:
        for session in sessions:
            assert wire.create(session, user_id="ann").created
            wire.append(session, user("first-1", "hello"), durability=CLOUD_ACK)
        with Load(world.daemon.address, sessions, writers=4, seed=9, cloud_share=0.2) as load:
            for _ in range(2):
                load.wait_for(50)
                world.daemon.kill()
                world.daemon.start()
            load.wait_for(50)
            load.end()
            load.check(wire)
        assert not wire.admin.Flush(admin_pb2.FlushRequest()).failed_sessions
        before = {session: [turn.chain for turn in wire.resume(session).turns] for session in sessions}
        wire.close()
        assert world.daemon.terminate() == 0
        world.daemon.lose_hot_tier()
        world.daemon.start()
        with closing(world.wire()) as wire:
            for session, chains in before.items():
                cold = wire.resume(session)
                assert (cold.receipt.rung, [turn.chain for turn in cold.turns]) == (CLOUD, chains)
            load.check(wire)
        assert world.daemon.terminate() == 0
        world.check_clean()
        # It is such a bucket: the manifests of before are all there, and those that are locked can't be destroyed.
        prefix = world.daemon.cloud.removeprefix(f"s3://{bucket}/")
        key = f"{prefix}/m/{hash_of('s0').hex()}"
        with closing(s3_client(seaweed)) as client:
            versions = client.list_object_versions(Bucket=bucket, Prefix=key)["Versions"]
            assert len(versions) > 5
            destroy = {"Bucket": bucket, "Key": key, "VersionId": versions[-1]["VersionId"]}
            if kind == "locked":
                with pytest.raises(ClientError, match="AccessDenied"):
                    client.delete_object(**destroy)
            else:
                client.delete_object(**destroy)


def test_a_damaged_segment_is_put_back_from_its_older_version_while_the_daemon_serves(seaweed: Seaweed) -> None:
    bucket = make_bucket(seaweed, "versioned", **BUCKETS["versioned"])
    with faulty(seaweed, bucket=bucket, store_read_timeout_ms=10_000) as world, closing(world.wire()) as wire:
        wire.create("a")
        for number in range(1, 5):
            wire.append("a", user(f"t{number}", f"{number} " * 12_000), durability=CLOUD_ACK)
        wire.append("a", assistant("t5", "that was much"), durability=CLOUD_ACK)
        wire.close()
        assert world.daemon.terminate() == 0
        world.daemon.lose_hot_tier()
        row = world.manifest("a").segments[0]
        prefix = world.daemon.cloud.removeprefix(f"s3://{bucket}/")
        where = {"Bucket": bucket, "Key": f"{prefix}/{segment_key(hash_of('a'), row[0], row[1], row[3])}"}
        with closing(s3_client(seaweed)) as client:
            sound = client.get_object(**where)
            body = bytearray(sound["Body"].read())
            body[len(body) // 2] ^= 1
            client.put_object(**where, Body=bytes(body))
            world.daemon.start()
            with closing(world.wire()) as wire:
                damaged = refusal(lambda: list(wire.turns("a")))
                assert (damaged.code.name, damaged.reason) == ("DATA_LOSS", "CORRUPT_SEGMENT")
                # As docs/s3.md says it.
                client.copy_object(**where, CopySource={**where, "VersionId": sound["VersionId"]})
                assert [turn.turn_id for turn in wire.turns("a")] == ["t1", "t2", "t3", "t4", "t5"]
                assert wire.append("a", user("t6", "and so on")).head.seq == 6
                assert wire.resume("a").receipt.rung == HOT
            assert world.daemon.terminate() == 0
        world.check_clean()


def test_a_damaged_manifest_is_put_back_while_the_daemon_serves_and_an_older_one_is_refused(seaweed: Seaweed) -> None:
    bucket = make_bucket(seaweed, "versioned", **BUCKETS["versioned"])
    with faulty(seaweed, bucket=bucket, flush_interval_ms=3_600_000) as world, closing(world.wire()) as wire:
        wire.create("a")
        for number in range(1, 4):
            wire.append("a", user(f"t{number}", f"number {number}"), durability=CLOUD_ACK)
        prefix = world.daemon.cloud.removeprefix(f"s3://{bucket}/")
        where = {"Bucket": bucket, "Key": f"{prefix}/m/{hash_of('a').hex()}"}
        with closing(s3_client(seaweed)) as client:
            client.put_object(**where, Body=b"damaged")
            told = refusal(wire.append, "a", user("t4", "number 4"), durability=CLOUD_ACK)
            assert (told.code.name, told.reason) == ("UNAVAILABLE", "CLOUD_NOT_COMMITTED")
            assert wire.resume("a").receipt.rung == HOT
            versions = client.list_object_versions(Bucket=bucket, Prefix=where["Key"])["Versions"]
            client.copy_object(**where, CopySource={**where, "VersionId": versions[2]["VersionId"]})
            told = refusal(wire.append, "a", user("t4", "number 4"), durability=CLOUD_ACK)
            assert told.reason == "CLOUD_NOT_COMMITTED"
            assert "older than the one that this node committed" in told.message
            # The newest before the damage: what docs/s3.md says to put back.
            client.copy_object(**where, CopySource={**where, "VersionId": versions[1]["VersionId"]})
        done = completed(lambda: wire.append("a", user("t4", "number 4"), durability=CLOUD_ACK))
        assert (done.turns[0].duplicate, done.cloud_seq) == (True, 4)
        wire.close()
        assert world.daemon.terminate() == 0
        world.check_clean()
