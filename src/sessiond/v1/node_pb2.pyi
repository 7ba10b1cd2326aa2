from sessiond.v1 import turn_pb2 as _turn_pb2
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RescueOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESCUE_OUTCOME_UNSPECIFIED: _ClassVar[RescueOutcome]
    RESCUE_OUTCOME_APPLIED: _ClassVar[RescueOutcome]
    RESCUE_OUTCOME_KNOWN: _ClassVar[RescueOutcome]
    RESCUE_OUTCOME_LISTED: _ClassVar[RescueOutcome]
    RESCUE_OUTCOME_DELETED: _ClassVar[RescueOutcome]
RESCUE_OUTCOME_UNSPECIFIED: RescueOutcome
RESCUE_OUTCOME_APPLIED: RescueOutcome
RESCUE_OUTCOME_KNOWN: RescueOutcome
RESCUE_OUTCOME_LISTED: RescueOutcome
RESCUE_OUTCOME_DELETED: RescueOutcome

class ForwardRequest(_message.Message):
    __slots__ = ("method", "request", "tenant", "incarnation", "from_node")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FROM_NODE_FIELD_NUMBER: _ClassVar[int]
    method: str
    request: bytes
    tenant: str
    incarnation: bytes
    from_node: str
    def __init__(self, method: _Optional[str] = ..., request: _Optional[bytes] = ..., tenant: _Optional[str] = ..., incarnation: _Optional[bytes] = ..., from_node: _Optional[str] = ...) -> None: ...

class ForwardResponse(_message.Message):
    __slots__ = ("reply", "status", "not_owner")
    REPLY_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    NOT_OWNER_FIELD_NUMBER: _ClassVar[int]
    reply: bytes
    status: bytes
    not_owner: bool
    def __init__(self, reply: _Optional[bytes] = ..., status: _Optional[bytes] = ..., not_owner: _Optional[bool] = ...) -> None: ...

class ForwardWatchRequest(_message.Message):
    __slots__ = ("call",)
    CALL_FIELD_NUMBER: _ClassVar[int]
    call: ForwardRequest
    def __init__(self, call: _Optional[_Union[ForwardRequest, _Mapping]] = ...) -> None: ...

class ForwardWatchResponse(_message.Message):
    __slots__ = ("event",)
    EVENT_FIELD_NUMBER: _ClassVar[int]
    event: ForwardResponse
    def __init__(self, event: _Optional[_Union[ForwardResponse, _Mapping]] = ...) -> None: ...

class RescueRequest(_message.Message):
    __slots__ = ("session_hash", "orphan", "epoch", "turns", "sha256", "incarnation", "blobs", "from_incarnation", "head_seq")
    SESSION_HASH_FIELD_NUMBER: _ClassVar[int]
    ORPHAN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    FROM_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    HEAD_SEQ_FIELD_NUMBER: _ClassVar[int]
    session_hash: bytes
    orphan: str
    epoch: int
    turns: _turn_pb2.SeqRange
    sha256: bytes
    incarnation: bytes
    blobs: bytes
    from_incarnation: bytes
    head_seq: int
    def __init__(self, session_hash: _Optional[bytes] = ..., orphan: _Optional[str] = ..., epoch: _Optional[int] = ..., turns: _Optional[_Union[_turn_pb2.SeqRange, _Mapping]] = ..., sha256: _Optional[bytes] = ..., incarnation: _Optional[bytes] = ..., blobs: _Optional[bytes] = ..., from_incarnation: _Optional[bytes] = ..., head_seq: _Optional[int] = ...) -> None: ...

class RescueResponse(_message.Message):
    __slots__ = ("outcome",)
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    outcome: RescueOutcome
    def __init__(self, outcome: _Optional[_Union[RescueOutcome, str]] = ...) -> None: ...
