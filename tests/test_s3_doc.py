"""What docs/s3.md tells an operator to put on a bucket is what the store takes, and what the daemon can live with."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jmespath
import pytest
from botocore.exceptions import ClientError
from botocore.validate import ParamValidator

from sessiond.tiers.cloud.bucket import KINDS, object_kind
from sessiond.tiers.cloud.s3 import S3Store
from tests.seaweed import Seaweed, make_bucket, s3_client

DOC = (Path(__file__).resolve().parents[1] / "docs" / "s3.md").read_text()
PREFIX = "PREFIX"
# "Actions, resources, and condition keys for Amazon S3", where an operation has another name than its action.
ACTIONS = {"ListObjectsV2": "s3:ListBucket"}


def block(key: str, word: str, bucket: str = "BUCKET") -> dict[str, Any]:
    """The one block of JSON on the page with this key, in whose first element the word occurs or not (!word)."""
    found = []
    for text in re.findall(r"```json\n(.*?)```", DOC, re.DOTALL):
        parsed = json.loads(text.replace("BUCKET", bucket))
        if key in parsed and (word.lstrip("!") in parsed[key][0]) is not word.startswith("!"):
            found.append(parsed)
    assert len(found) == 1
    return dict(found[0])


def statements(policy: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {statement["Sid"]: statement for statement in policy["Statement"]}


def actions(statement: dict[str, Any]) -> set[str]:
    told = statement["Action"]
    return {told} if isinstance(told, str) else set(told)


@pytest.fixture
def bucket(seaweed: Seaweed) -> str:
    """A bucket for one test: a policy may well lock everybody out of it."""
    return make_bucket(seaweed, f"documented-{secrets.token_hex(8)}", versioned=True)


@pytest.fixture
def store(seaweed: Seaweed, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Store]:
    """A store below the prefix of the page."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweed.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweed.secret_key)
    with closing(S3Store(bucket, PREFIX, endpoint=seaweed.endpoint, path_style=True)) as opened:
        yield opened


def test_the_role_may_do_what_the_store_does_and_no_more(store: S3Store) -> None:
    asked: set[str] = set()

    def note(model: Any, **_: object) -> None:
        asked.add(ACTIONS.get(model.name, f"s3:{model.name}"))

    store._client.meta.events.register("before-call.s3", note)
    store.put("m/1", b"body")
    store.get("m/1")
    list(store.list("m/"))
    store.delete("m/1")
    by_sid = statements(block("Statement", "!Principal"))
    always = set().union(*(actions(each) for sid, each in by_sid.items() if not sid.startswith("Only")))
    assert always == asked
    assert actions(by_sid["OnlyWithTags"]) == {"s3:PutObjectTagging"}
    # Beside what it always may it only reads settings of the bucket.
    assert all(action.startswith("s3:Get") for action in actions(by_sid["OnlyForDoctor"]))


@pytest.mark.parametrize("sid", ["OnlyOverTls", "OnlyTheDaemonDeletes", "NobodyDestroysVersions"])
def test_the_buckets_policy_is_taken_and_denies_what_it_says(
    store: S3Store, seaweed: Seaweed, bucket: str, sid: str
) -> None:
    policy = block("Statement", "Principal", bucket)
    assert set(statements(policy)) == {"OnlyOverTls", "OnlyTheDaemonDeletes", "NobodyDestroysVersions"}
    store.put("s/1/2", b"body")
    where = {"Bucket": bucket, "Key": f"{PREFIX}/s/1/2"}
    with closing(s3_client(seaweed)) as client:
        version = client.head_object(**where)["VersionId"]
        alone = {**policy, "Statement": [statements(policy)[sid]]}
        client.put_bucket_policy(Bucket=bucket, Policy=json.dumps(alone))
        denied = {
            "read": lambda: client.get_object(**where),
            "write": lambda: client.put_object(**where, Body=b"again"),
            "delete": lambda: client.delete_object(**where),
            "destroy": lambda: client.delete_object(**where, VersionId=version),
        }
        expected = {
            "OnlyOverTls": ["read", "write", "delete", "destroy"],  # these tests come over plain HTTP
            "OnlyTheDaemonDeletes": ["delete"],
            "NobodyDestroysVersions": ["destroy"],
        }
        found = [name for name, call in denied.items() if is_denied(call)]
    assert found == expected[sid]


def is_denied(call: Any) -> bool:
    try:
        call()
    except ClientError as error:
        return bool(error.response["Error"]["Code"] == "AccessDenied")
    return False


def test_the_lifecycle_rules_are_taken_and_never_expire_a_conversation(
    store: S3Store, seaweed: Seaweed, bucket: str
) -> None:
    rules = block("Rules", "ID")
    shape = store._client.meta.service_model.operation_model("PutBucketLifecycleConfiguration").input_shape
    given = {"Bucket": bucket, "LifecycleConfiguration": rules}
    assert not ParamValidator().validate(given, shape).has_errors()
    # SeaweedFS has no storage classes.
    plain = [rule for rule in rules["Rules"] if "Transitions" not in rule]
    with closing(s3_client(seaweed)) as client:
        client.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": plain})
        taken = client.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
    assert sorted(rule["ID"] for rule in taken) == sorted(rule["ID"] for rule in plain)
    for rule in rules["Rules"]:
        if "Days" in rule.get("Expiration", {}):
            assert object_kind(rule["Filter"]["Prefix"].removeprefix(f"{PREFIX}/")) in ("lease", "probe")
        if "Transitions" in rule:
            assert object_kind(rule["Filter"]["And"]["Prefix"].removeprefix(f"{PREFIX}/")) == "segment"


def test_the_purge_takes_every_version_but_the_newest() -> None:
    [query] = re.findall(r"--query '([^']+)'", DOC)
    row = {"Key": f"{PREFIX}/m/1", "Size": 3, "IsLatest": False}
    older = [{**row, "VersionId": "1"}, {**row, "VersionId": "2"}]
    marker = {"Key": f"{PREFIX}/s/1/2", "VersionId": "4", "IsLatest": False}
    listing = {
        "Versions": [{**row, "VersionId": "3", "IsLatest": True}, *older],
        "DeleteMarkers": [marker, {**marker, "VersionId": "5", "IsLatest": True}],
    }
    hidden = [{"Key": each["Key"], "VersionId": each["VersionId"]} for each in (*older, marker)]
    assert jmespath.search(query, listing) == {"Objects": hidden}
    # Before anything was deleted the store lists no markers at all.
    assert jmespath.search(query, {"Versions": listing["Versions"]}) == {"Objects": hidden[:2]}


def test_every_kind_of_object_is_on_the_page() -> None:
    table = DOC.partition("## What lies where")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([a-z]+)`", "".join(line.split("|")[2] for line in table.splitlines() if "|" in line)))
    # Wrapped keys are for a later release, and told about under "Object lock".
    assert named - {"sessiond"} == {*KINDS.values(), "index"} - {"key"}
