"""Settings of the S3 store are refused by name before anything is opened, and what is taken reaches the store."""

from __future__ import annotations

import pytest

from sessiond import config, errors


@pytest.mark.parametrize(
    ("options", "key", "words"),
    [
        ({"s3_checksum": "md5"}, "s3_checksum", "none of crc32c, sha256, none"),
        ({"s3_sse": "aes"}, "s3_sse", "neither empty nor AES256 nor aws:kms"),
        ({"s3_sse": "AES256", "s3_kms_key": "k"}, "s3_kms_key", "only for s3_sse aws:kms"),
        ({"s3_tags": "team"}, "s3_tags", "'team' is not key=value"),
        ({"s3_tags": "=chat"}, "s3_tags", "'=chat' is not key=value"),
        ({"s3_tags": "team=chat,"}, "s3_tags", "is not key=value"),
        ({"s3_tags": "team=ch&t"}, "s3_tags", "A-Z a-z 0-9 space"),
        ({"s3_tags": f"{'k' * 129}=v"}, "s3_tags", "at most 128"),
        ({"s3_tags": f"k={'v' * 257}"}, "s3_tags", "at most 256"),
        ({"s3_tags": "team=a,team=b"}, "s3_tags", "there twice"),
        ({"s3_tags": "aws:team=a"}, "s3_tags", "reserved"),
        ({"s3_tags": "sessiond-kind=a"}, "s3_tags", "reserved"),
        ({"s3_tags": ",".join(f"k{number}=v" for number in range(10))}, "s3_tags", "10 tags are more than 9"),
    ],
)
def test_a_bad_setting_is_refused_by_name(options: dict[str, str], key: str, words: str) -> None:
    with pytest.raises(errors.Invalid) as refused:
        config.load(None, {}, options)
    assert refused.value.reason == "INVALID_CONFIG"
    assert [field for field, _ in refused.value.fields] == [key]
    assert words in refused.value.message


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("", {}),
        ("team=chat", {"team": "chat"}),
        ("team = chat , env=prod", {"team": "chat", "env": "prod"}),
        ("cost centre=4711/b,empty=", {"cost centre": "4711/b", "empty": ""}),
        (",".join(f"{'k' * 127}{number}={'v' * 256}" for number in range(9)), None),
    ],
)
def test_tags_are_read_as_they_are_written(text: str, tags: dict[str, str] | None) -> None:
    read = config.load(None, {}, {"s3_tags": text}).object_tags
    assert len(read) == 9 if tags is None else read == tags
