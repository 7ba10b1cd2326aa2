from sessiond.v1 import context_pb2 as _context_pb2
from sessiond.v1 import turn_pb2 as _turn_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StateScope(_message.Message):
    __slots__ = ("session_id", "user_id", "session_user_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_USER_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    user_id: str
    session_user_id: str
    def __init__(self, session_id: _Optional[str] = ..., user_id: _Optional[str] = ..., session_user_id: _Optional[str] = ...) -> None: ...

class MissingWrites(_message.Message):
    __slots__ = ("epoch", "after_version", "reason")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    AFTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    after_version: int
    reason: _context_pb2.MissingReason
    def __init__(self, epoch: _Optional[int] = ..., after_version: _Optional[int] = ..., reason: _Optional[_Union[_context_pb2.MissingReason, str]] = ...) -> None: ...

class StateHeader(_message.Message):
    __slots__ = ("key", "version", "size_bytes", "sha256", "media_type", "updated_at_unix_ms", "labels", "durability")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    KEY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    MEDIA_TYPE_FIELD_NUMBER: _ClassVar[int]
    UPDATED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    key: str
    version: int
    size_bytes: int
    sha256: bytes
    media_type: str
    updated_at_unix_ms: int
    labels: _containers.ScalarMap[str, str]
    durability: _turn_pb2.Durability
    def __init__(self, key: _Optional[str] = ..., version: _Optional[int] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[bytes] = ..., media_type: _Optional[str] = ..., updated_at_unix_ms: _Optional[int] = ..., labels: _Optional[_Mapping[str, str]] = ..., durability: _Optional[_Union[_turn_pb2.Durability, str]] = ...) -> None: ...

class GetStateRequest(_message.Message):
    __slots__ = ("scope", "key", "known_version")
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    KNOWN_VERSION_FIELD_NUMBER: _ClassVar[int]
    scope: StateScope
    key: str
    known_version: int
    def __init__(self, scope: _Optional[_Union[StateScope, _Mapping]] = ..., key: _Optional[str] = ..., known_version: _Optional[int] = ...) -> None: ...

class GetStateResponse(_message.Message):
    __slots__ = ("header", "content", "not_modified", "missing", "rung", "ownership")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    NOT_MODIFIED_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    RUNG_FIELD_NUMBER: _ClassVar[int]
    OWNERSHIP_FIELD_NUMBER: _ClassVar[int]
    header: StateHeader
    content: bytes
    not_modified: bool
    missing: _containers.RepeatedCompositeFieldContainer[MissingWrites]
    rung: _context_pb2.Rung
    ownership: _context_pb2.Ownership
    def __init__(self, header: _Optional[_Union[StateHeader, _Mapping]] = ..., content: _Optional[bytes] = ..., not_modified: _Optional[bool] = ..., missing: _Optional[_Iterable[_Union[MissingWrites, _Mapping]]] = ..., rung: _Optional[_Union[_context_pb2.Rung, str]] = ..., ownership: _Optional[_Union[_context_pb2.Ownership, str]] = ...) -> None: ...

class PutStateRequest(_message.Message):
    __slots__ = ("scope", "key", "content", "expected_version", "media_type", "labels", "write_id", "durability")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    MEDIA_TYPE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    WRITE_ID_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    scope: StateScope
    key: str
    content: bytes
    expected_version: int
    media_type: str
    labels: _containers.ScalarMap[str, str]
    write_id: str
    durability: _turn_pb2.Durability
    def __init__(self, scope: _Optional[_Union[StateScope, _Mapping]] = ..., key: _Optional[str] = ..., content: _Optional[bytes] = ..., expected_version: _Optional[int] = ..., media_type: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., write_id: _Optional[str] = ..., durability: _Optional[_Union[_turn_pb2.Durability, str]] = ...) -> None: ...

class PutStateResponse(_message.Message):
    __slots__ = ("header", "duplicate", "ownership")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    OWNERSHIP_FIELD_NUMBER: _ClassVar[int]
    header: StateHeader
    duplicate: bool
    ownership: _context_pb2.Ownership
    def __init__(self, header: _Optional[_Union[StateHeader, _Mapping]] = ..., duplicate: _Optional[bool] = ..., ownership: _Optional[_Union[_context_pb2.Ownership, str]] = ...) -> None: ...

class DeleteStateRequest(_message.Message):
    __slots__ = ("scope", "key", "expected_version", "durability", "write_id")
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    WRITE_ID_FIELD_NUMBER: _ClassVar[int]
    scope: StateScope
    key: str
    expected_version: int
    durability: _turn_pb2.Durability
    write_id: str
    def __init__(self, scope: _Optional[_Union[StateScope, _Mapping]] = ..., key: _Optional[str] = ..., expected_version: _Optional[int] = ..., durability: _Optional[_Union[_turn_pb2.Durability, str]] = ..., write_id: _Optional[str] = ...) -> None: ...

class DeleteStateResponse(_message.Message):
    __slots__ = ("deleted", "durability", "ownership", "duplicate")
    DELETED_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    OWNERSHIP_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    deleted: bool
    durability: _turn_pb2.Durability
    ownership: _context_pb2.Ownership
    duplicate: bool
    def __init__(self, deleted: _Optional[bool] = ..., durability: _Optional[_Union[_turn_pb2.Durability, str]] = ..., ownership: _Optional[_Union[_context_pb2.Ownership, str]] = ..., duplicate: _Optional[bool] = ...) -> None: ...

class ListStatesRequest(_message.Message):
    __slots__ = ("scope", "key_prefix", "page_size", "page_token", "accept_missing")
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    KEY_PREFIX_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_MISSING_FIELD_NUMBER: _ClassVar[int]
    scope: StateScope
    key_prefix: str
    page_size: int
    page_token: str
    accept_missing: int
    def __init__(self, scope: _Optional[_Union[StateScope, _Mapping]] = ..., key_prefix: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., accept_missing: _Optional[int] = ...) -> None: ...

class ListStatesResponse(_message.Message):
    __slots__ = ("headers", "next_page_token", "missing", "rung", "ownership")
    HEADERS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    RUNG_FIELD_NUMBER: _ClassVar[int]
    OWNERSHIP_FIELD_NUMBER: _ClassVar[int]
    headers: _containers.RepeatedCompositeFieldContainer[StateHeader]
    next_page_token: str
    missing: _containers.RepeatedCompositeFieldContainer[MissingWrites]
    rung: _context_pb2.Rung
    ownership: _context_pb2.Ownership
    def __init__(self, headers: _Optional[_Iterable[_Union[StateHeader, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., missing: _Optional[_Iterable[_Union[MissingWrites, _Mapping]]] = ..., rung: _Optional[_Union[_context_pb2.Rung, str]] = ..., ownership: _Optional[_Union[_context_pb2.Ownership, str]] = ...) -> None: ...
