from sessiond.v1 import context_pb2 as _context_pb2
from sessiond.v1 import turn_pb2 as _turn_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Lifecycle(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LIFECYCLE_UNSPECIFIED: _ClassVar[Lifecycle]
    LIFECYCLE_ACTIVE: _ClassVar[Lifecycle]
    LIFECYCLE_ARCHIVED: _ClassVar[Lifecycle]

class ConflictMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONFLICT_MODE_UNSPECIFIED: _ClassVar[ConflictMode]
    CONFLICT_MODE_FAIL: _ClassVar[ConflictMode]
    CONFLICT_MODE_RETURN_TAIL: _ClassVar[ConflictMode]

class AppendOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    APPEND_OUTCOME_UNSPECIFIED: _ClassVar[AppendOutcome]
    APPEND_OUTCOME_APPENDED: _ClassVar[AppendOutcome]
    APPEND_OUTCOME_DUPLICATE: _ClassVar[AppendOutcome]
    APPEND_OUTCOME_CONFLICT: _ClassVar[AppendOutcome]
LIFECYCLE_UNSPECIFIED: Lifecycle
LIFECYCLE_ACTIVE: Lifecycle
LIFECYCLE_ARCHIVED: Lifecycle
CONFLICT_MODE_UNSPECIFIED: ConflictMode
CONFLICT_MODE_FAIL: ConflictMode
CONFLICT_MODE_RETURN_TAIL: ConflictMode
APPEND_OUTCOME_UNSPECIFIED: AppendOutcome
APPEND_OUTCOME_APPENDED: AppendOutcome
APPEND_OUTCOME_DUPLICATE: AppendOutcome
APPEND_OUTCOME_CONFLICT: AppendOutcome

class Session(_message.Message):
    __slots__ = ("session_id", "user_id", "created_at_unix_ms", "last_append_at_unix_ms", "policy", "state", "pins", "lifecycle", "head", "cloud_seq", "epoch", "checkpoint", "expires_at_unix_ms", "live_messages", "live_tokens_o200k", "live_tokens_cl100k", "forked_from_session_id", "forked_at", "reset_of_session_id", "missing", "owner_node", "ownership")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    LAST_APPEND_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    LIFECYCLE_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CLOUD_SEQ_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    LIVE_MESSAGES_FIELD_NUMBER: _ClassVar[int]
    LIVE_TOKENS_O200K_FIELD_NUMBER: _ClassVar[int]
    LIVE_TOKENS_CL100K_FIELD_NUMBER: _ClassVar[int]
    FORKED_FROM_SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    FORKED_AT_FIELD_NUMBER: _ClassVar[int]
    RESET_OF_SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    OWNER_NODE_FIELD_NUMBER: _ClassVar[int]
    OWNERSHIP_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    user_id: str
    created_at_unix_ms: int
    last_append_at_unix_ms: int
    policy: _turn_pb2.SessionPolicy
    state: _context_pb2.SessionState
    pins: _containers.RepeatedCompositeFieldContainer[_turn_pb2.PinnedFact]
    lifecycle: Lifecycle
    head: _turn_pb2.TurnPosition
    cloud_seq: int
    epoch: int
    checkpoint: _context_pb2.CheckpointHeader
    expires_at_unix_ms: int
    live_messages: int
    live_tokens_o200k: int
    live_tokens_cl100k: int
    forked_from_session_id: str
    forked_at: _turn_pb2.TurnPosition
    reset_of_session_id: str
    missing: _containers.RepeatedCompositeFieldContainer[_context_pb2.MissingRange]
    owner_node: str
    ownership: _context_pb2.Ownership
    def __init__(self, session_id: _Optional[str] = ..., user_id: _Optional[str] = ..., created_at_unix_ms: _Optional[int] = ..., last_append_at_unix_ms: _Optional[int] = ..., policy: _Optional[_Union[_turn_pb2.SessionPolicy, _Mapping]] = ..., state: _Optional[_Union[_context_pb2.SessionState, _Mapping]] = ..., pins: _Optional[_Iterable[_Union[_turn_pb2.PinnedFact, _Mapping]]] = ..., lifecycle: _Optional[_Union[Lifecycle, str]] = ..., head: _Optional[_Union[_turn_pb2.TurnPosition, _Mapping]] = ..., cloud_seq: _Optional[int] = ..., epoch: _Optional[int] = ..., checkpoint: _Optional[_Union[_context_pb2.CheckpointHeader, _Mapping]] = ..., expires_at_unix_ms: _Optional[int] = ..., live_messages: _Optional[int] = ..., live_tokens_o200k: _Optional[int] = ..., live_tokens_cl100k: _Optional[int] = ..., forked_from_session_id: _Optional[str] = ..., forked_at: _Optional[_Union[_turn_pb2.TurnPosition, _Mapping]] = ..., reset_of_session_id: _Optional[str] = ..., missing: _Optional[_Iterable[_Union[_context_pb2.MissingRange, _Mapping]]] = ..., owner_node: _Optional[str] = ..., ownership: _Optional[_Union[_context_pb2.Ownership, str]] = ...) -> None: ...

class CreateSessionRequest(_message.Message):
    __slots__ = ("session_id", "user_id", "policy", "metadata", "created_at_unix_ms")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    user_id: str
    policy: _turn_pb2.SessionPolicy
    metadata: _containers.ScalarMap[str, str]
    created_at_unix_ms: int
    def __init__(self, session_id: _Optional[str] = ..., user_id: _Optional[str] = ..., policy: _Optional[_Union[_turn_pb2.SessionPolicy, _Mapping]] = ..., metadata: _Optional[_Mapping[str, str]] = ..., created_at_unix_ms: _Optional[int] = ...) -> None: ...

class CreateSessionResponse(_message.Message):
    __slots__ = ("session", "created")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    session: Session
    created: bool
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., created: _Optional[bool] = ...) -> None: ...

class GetSessionRequest(_message.Message):
    __slots__ = ("session_id", "user_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    user_id: str
    def __init__(self, session_id: _Optional[str] = ..., user_id: _Optional[str] = ...) -> None: ...

class GetSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: Session
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ...) -> None: ...

class ListSessionsRequest(_message.Message):
    __slots__ = ("user_id", "page_size", "page_token")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    page_size: int
    page_token: str
    def __init__(self, user_id: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListSessionsResponse(_message.Message):
    __slots__ = ("sessions", "next_page_token", "unreadable", "incomplete")
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    UNREADABLE_FIELD_NUMBER: _ClassVar[int]
    INCOMPLETE_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[Session]
    next_page_token: str
    unreadable: _containers.RepeatedCompositeFieldContainer[UnreadableSession]
    incomplete: bool
    def __init__(self, sessions: _Optional[_Iterable[_Union[Session, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., unreadable: _Optional[_Iterable[_Union[UnreadableSession, _Mapping]]] = ..., incomplete: _Optional[bool] = ...) -> None: ...

class UnreadableSession(_message.Message):
    __slots__ = ("session_id", "reason")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    reason: str
    def __init__(self, session_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class UpdateSessionRequest(_message.Message):
    __slots__ = ("session_id", "user_id", "etag", "turn_id", "change", "durability")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    TURN_ID_FIELD_NUMBER: _ClassVar[int]
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    user_id: str
    etag: str
    turn_id: str
    change: _turn_pb2.StateChange
    durability: _turn_pb2.Durability
    def __init__(self, session_id: _Optional[str] = ..., user_id: _Optional[str] = ..., etag: _Optional[str] = ..., turn_id: _Optional[str] = ..., change: _Optional[_Union[_turn_pb2.StateChange, _Mapping]] = ..., durability: _Optional[_Union[_turn_pb2.Durability, str]] = ...) -> None: ...

class UpdateSessionResponse(_message.Message):
    __slots__ = ("session", "appended")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    APPENDED_FIELD_NUMBER: _ClassVar[int]
    session: Session
    appended: AppendedTurn
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., appended: _Optional[_Union[AppendedTurn, _Mapping]] = ...) -> None: ...

class DeleteSessionRequest(_message.Message):
    __slots__ = ("session_id", "user_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    user_id: str
    def __init__(self, session_id: _Optional[str] = ..., user_id: _Optional[str] = ...) -> None: ...

class DeleteSessionResponse(_message.Message):
    __slots__ = ("deleted",)
    DELETED_FIELD_NUMBER: _ClassVar[int]
    deleted: bool
    def __init__(self, deleted: _Optional[bool] = ...) -> None: ...

class ResumeSessionRequest(_message.Message):
    __slots__ = ("session_id", "user_id", "context", "highest_acked", "known_checkpoint_version", "accept_missing", "reset_to_session_id", "read_only")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    HIGHEST_ACKED_FIELD_NUMBER: _ClassVar[int]
    KNOWN_CHECKPOINT_VERSION_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_MISSING_FIELD_NUMBER: _ClassVar[int]
    RESET_TO_SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    READ_ONLY_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    user_id: str
    context: _context_pb2.ContextSpec
    highest_acked: _turn_pb2.TurnPosition
    known_checkpoint_version: int
    accept_missing: int
    reset_to_session_id: str
    read_only: bool
    def __init__(self, session_id: _Optional[str] = ..., user_id: _Optional[str] = ..., context: _Optional[_Union[_context_pb2.ContextSpec, _Mapping]] = ..., highest_acked: _Optional[_Union[_turn_pb2.TurnPosition, _Mapping]] = ..., known_checkpoint_version: _Optional[int] = ..., accept_missing: _Optional[int] = ..., reset_to_session_id: _Optional[str] = ..., read_only: _Optional[bool] = ...) -> None: ...

class ResumeSessionResponse(_message.Message):
    __slots__ = ("context",)
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    context: _context_pb2.ActiveContext
    def __init__(self, context: _Optional[_Union[_context_pb2.ActiveContext, _Mapping]] = ...) -> None: ...

class AppendTurnRequest(_message.Message):
    __slots__ = ("session_id", "user_id", "turns", "expected", "durability", "context", "conflict_mode", "writer_token")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    CONFLICT_MODE_FIELD_NUMBER: _ClassVar[int]
    WRITER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    user_id: str
    turns: _containers.RepeatedCompositeFieldContainer[_turn_pb2.TurnInput]
    expected: _turn_pb2.TurnPosition
    durability: _turn_pb2.Durability
    context: _context_pb2.ContextSpec
    conflict_mode: ConflictMode
    writer_token: str
    def __init__(self, session_id: _Optional[str] = ..., user_id: _Optional[str] = ..., turns: _Optional[_Iterable[_Union[_turn_pb2.TurnInput, _Mapping]]] = ..., expected: _Optional[_Union[_turn_pb2.TurnPosition, _Mapping]] = ..., durability: _Optional[_Union[_turn_pb2.Durability, str]] = ..., context: _Optional[_Union[_context_pb2.ContextSpec, _Mapping]] = ..., conflict_mode: _Optional[_Union[ConflictMode, str]] = ..., writer_token: _Optional[str] = ...) -> None: ...

class AppendedTurn(_message.Message):
    __slots__ = ("turn_id", "position", "duplicate", "append_time_unix_ms", "tokens_o200k", "tokens_cl100k")
    TURN_ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    APPEND_TIME_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_O200K_FIELD_NUMBER: _ClassVar[int]
    TOKENS_CL100K_FIELD_NUMBER: _ClassVar[int]
    turn_id: str
    position: _turn_pb2.TurnPosition
    duplicate: bool
    append_time_unix_ms: int
    tokens_o200k: int
    tokens_cl100k: int
    def __init__(self, turn_id: _Optional[str] = ..., position: _Optional[_Union[_turn_pb2.TurnPosition, _Mapping]] = ..., duplicate: _Optional[bool] = ..., append_time_unix_ms: _Optional[int] = ..., tokens_o200k: _Optional[int] = ..., tokens_cl100k: _Optional[int] = ...) -> None: ...

class AppendConflict(_message.Message):
    __slots__ = ("turns", "head", "truncated")
    TURNS_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    turns: _containers.RepeatedCompositeFieldContainer[_turn_pb2.Turn]
    head: _turn_pb2.TurnPosition
    truncated: bool
    def __init__(self, turns: _Optional[_Iterable[_Union[_turn_pb2.Turn, _Mapping]]] = ..., head: _Optional[_Union[_turn_pb2.TurnPosition, _Mapping]] = ..., truncated: _Optional[bool] = ...) -> None: ...

class AppendTurnResponse(_message.Message):
    __slots__ = ("context", "outcome", "turns", "head", "cloud_seq", "checkpoint_version", "durability", "ownership", "missing", "conflict", "context_error")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CLOUD_SEQ_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_VERSION_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    OWNERSHIP_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    CONFLICT_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_ERROR_FIELD_NUMBER: _ClassVar[int]
    context: _context_pb2.ActiveContext
    outcome: AppendOutcome
    turns: _containers.RepeatedCompositeFieldContainer[AppendedTurn]
    head: _turn_pb2.TurnPosition
    cloud_seq: int
    checkpoint_version: int
    durability: _turn_pb2.Durability
    ownership: _context_pb2.Ownership
    missing: _containers.RepeatedCompositeFieldContainer[_context_pb2.MissingRange]
    conflict: AppendConflict
    context_error: ItemError
    def __init__(self, context: _Optional[_Union[_context_pb2.ActiveContext, _Mapping]] = ..., outcome: _Optional[_Union[AppendOutcome, str]] = ..., turns: _Optional[_Iterable[_Union[AppendedTurn, _Mapping]]] = ..., head: _Optional[_Union[_turn_pb2.TurnPosition, _Mapping]] = ..., cloud_seq: _Optional[int] = ..., checkpoint_version: _Optional[int] = ..., durability: _Optional[_Union[_turn_pb2.Durability, str]] = ..., ownership: _Optional[_Union[_context_pb2.Ownership, str]] = ..., missing: _Optional[_Iterable[_Union[_context_pb2.MissingRange, _Mapping]]] = ..., conflict: _Optional[_Union[AppendConflict, _Mapping]] = ..., context_error: _Optional[_Union[ItemError, _Mapping]] = ...) -> None: ...

class ItemError(_message.Message):
    __slots__ = ("code", "reason", "message", "metadata", "retry_after_ms")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: int
    reason: str
    message: str
    metadata: _containers.ScalarMap[str, str]
    retry_after_ms: int
    def __init__(self, code: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class BatchResumeSessionsRequest(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[ResumeSessionRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[ResumeSessionRequest, _Mapping]]] = ...) -> None: ...

class BatchResumeSessionsItem(_message.Message):
    __slots__ = ("context", "error")
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    context: _context_pb2.ActiveContext
    error: ItemError
    def __init__(self, context: _Optional[_Union[_context_pb2.ActiveContext, _Mapping]] = ..., error: _Optional[_Union[ItemError, _Mapping]] = ...) -> None: ...

class BatchResumeSessionsResponse(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[BatchResumeSessionsItem]
    def __init__(self, items: _Optional[_Iterable[_Union[BatchResumeSessionsItem, _Mapping]]] = ...) -> None: ...

class BatchAppendTurnsRequest(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[AppendTurnRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[AppendTurnRequest, _Mapping]]] = ...) -> None: ...

class BatchAppendTurnsItem(_message.Message):
    __slots__ = ("response", "error")
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    response: AppendTurnResponse
    error: ItemError
    def __init__(self, response: _Optional[_Union[AppendTurnResponse, _Mapping]] = ..., error: _Optional[_Union[ItemError, _Mapping]] = ...) -> None: ...

class BatchAppendTurnsResponse(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[BatchAppendTurnsItem]
    def __init__(self, items: _Optional[_Iterable[_Union[BatchAppendTurnsItem, _Mapping]]] = ...) -> None: ...

class ListTurnsRequest(_message.Message):
    __slots__ = ("session_id", "user_id", "page_size", "page_token", "first_seq", "last_seq")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    FIRST_SEQ_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQ_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    user_id: str
    page_size: int
    page_token: str
    first_seq: int
    last_seq: int
    def __init__(self, session_id: _Optional[str] = ..., user_id: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., first_seq: _Optional[int] = ..., last_seq: _Optional[int] = ...) -> None: ...

class ListTurnsResponse(_message.Message):
    __slots__ = ("turns", "next_page_token", "receipt")
    TURNS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    turns: _containers.RepeatedCompositeFieldContainer[_turn_pb2.Turn]
    next_page_token: str
    receipt: _context_pb2.Receipt
    def __init__(self, turns: _Optional[_Iterable[_Union[_turn_pb2.Turn, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., receipt: _Optional[_Union[_context_pb2.Receipt, _Mapping]] = ...) -> None: ...

class ListCheckpointsRequest(_message.Message):
    __slots__ = ("session_id", "user_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    user_id: str
    def __init__(self, session_id: _Optional[str] = ..., user_id: _Optional[str] = ...) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("header", "content", "state", "pins")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    header: _context_pb2.CheckpointHeader
    content: bytes
    state: _context_pb2.SessionState
    pins: _containers.RepeatedCompositeFieldContainer[_turn_pb2.PinnedFact]
    def __init__(self, header: _Optional[_Union[_context_pb2.CheckpointHeader, _Mapping]] = ..., content: _Optional[bytes] = ..., state: _Optional[_Union[_context_pb2.SessionState, _Mapping]] = ..., pins: _Optional[_Iterable[_Union[_turn_pb2.PinnedFact, _Mapping]]] = ...) -> None: ...

class ListCheckpointsResponse(_message.Message):
    __slots__ = ("checkpoints",)
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    checkpoints: _containers.RepeatedCompositeFieldContainer[Checkpoint]
    def __init__(self, checkpoints: _Optional[_Iterable[_Union[Checkpoint, _Mapping]]] = ...) -> None: ...

class ForkSessionRequest(_message.Message):
    __slots__ = ("session_id", "user_id", "seq", "checkpoint_version", "new_session_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_VERSION_FIELD_NUMBER: _ClassVar[int]
    NEW_SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    user_id: str
    seq: int
    checkpoint_version: int
    new_session_id: str
    def __init__(self, session_id: _Optional[str] = ..., user_id: _Optional[str] = ..., seq: _Optional[int] = ..., checkpoint_version: _Optional[int] = ..., new_session_id: _Optional[str] = ...) -> None: ...

class ForkSessionResponse(_message.Message):
    __slots__ = ("session", "created")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    session: Session
    created: bool
    def __init__(self, session: _Optional[_Union[Session, _Mapping]] = ..., created: _Optional[bool] = ...) -> None: ...

class WarmSessionRequest(_message.Message):
    __slots__ = ("session_id", "user_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    user_id: str
    def __init__(self, session_id: _Optional[str] = ..., user_id: _Optional[str] = ...) -> None: ...

class WarmSessionResponse(_message.Message):
    __slots__ = ("hot",)
    HOT_FIELD_NUMBER: _ClassVar[int]
    hot: bool
    def __init__(self, hot: _Optional[bool] = ...) -> None: ...

class WatchSessionRequest(_message.Message):
    __slots__ = ("session_id", "user_id", "after")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    user_id: str
    after: _turn_pb2.TurnPosition
    def __init__(self, session_id: _Optional[str] = ..., user_id: _Optional[str] = ..., after: _Optional[_Union[_turn_pb2.TurnPosition, _Mapping]] = ...) -> None: ...

class WatchSessionResponse(_message.Message):
    __slots__ = ("turns", "head", "checkpoint_version", "cloud_seq", "epoch_changed", "deleted", "missing")
    TURNS_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_VERSION_FIELD_NUMBER: _ClassVar[int]
    CLOUD_SEQ_FIELD_NUMBER: _ClassVar[int]
    EPOCH_CHANGED_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    turns: _containers.RepeatedCompositeFieldContainer[_turn_pb2.Turn]
    head: _turn_pb2.TurnPosition
    checkpoint_version: int
    cloud_seq: int
    epoch_changed: bool
    deleted: bool
    missing: _containers.RepeatedCompositeFieldContainer[_context_pb2.MissingRange]
    def __init__(self, turns: _Optional[_Iterable[_Union[_turn_pb2.Turn, _Mapping]]] = ..., head: _Optional[_Union[_turn_pb2.TurnPosition, _Mapping]] = ..., checkpoint_version: _Optional[int] = ..., cloud_seq: _Optional[int] = ..., epoch_changed: _Optional[bool] = ..., deleted: _Optional[bool] = ..., missing: _Optional[_Iterable[_Union[_context_pb2.MissingRange, _Mapping]]] = ...) -> None: ...

class ListOrphansRequest(_message.Message):
    __slots__ = ("session_id", "user_id", "page_token")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    user_id: str
    page_token: str
    def __init__(self, session_id: _Optional[str] = ..., user_id: _Optional[str] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListOrphansResponse(_message.Message):
    __slots__ = ("turns", "next_page_token")
    TURNS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    turns: _containers.RepeatedCompositeFieldContainer[_turn_pb2.Turn]
    next_page_token: str
    def __init__(self, turns: _Optional[_Iterable[_Union[_turn_pb2.Turn, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...
