from sessiond.v1 import turn_pb2 as _turn_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Rung(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RUNG_UNSPECIFIED: _ClassVar[Rung]
    RUNG_HOT: _ClassVar[Rung]
    RUNG_CLOUD: _ClassVar[Rung]
    RUNG_PARTIAL: _ClassVar[Rung]
    RUNG_RESET: _ClassVar[Rung]

class Ownership(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OWNERSHIP_UNSPECIFIED: _ClassVar[Ownership]
    OWNERSHIP_CONFIRMED: _ClassVar[Ownership]
    OWNERSHIP_UNCONFIRMED: _ClassVar[Ownership]

class MissingReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MISSING_REASON_UNSPECIFIED: _ClassVar[MissingReason]
    MISSING_REASON_HOT_TIER_LOST: _ClassVar[MissingReason]
    MISSING_REASON_OWNER_UNREACHABLE: _ClassVar[MissingReason]
    MISSING_REASON_SEGMENT_UNREADABLE: _ClassVar[MissingReason]
    MISSING_REASON_PARENT_ERASED: _ClassVar[MissingReason]
RUNG_UNSPECIFIED: Rung
RUNG_HOT: Rung
RUNG_CLOUD: Rung
RUNG_PARTIAL: Rung
RUNG_RESET: Rung
OWNERSHIP_UNSPECIFIED: Ownership
OWNERSHIP_CONFIRMED: Ownership
OWNERSHIP_UNCONFIRMED: Ownership
MISSING_REASON_UNSPECIFIED: MissingReason
MISSING_REASON_HOT_TIER_LOST: MissingReason
MISSING_REASON_OWNER_UNREACHABLE: MissingReason
MISSING_REASON_SEGMENT_UNREADABLE: MissingReason
MISSING_REASON_PARENT_ERASED: MissingReason

class ContextSpec(_message.Message):
    __slots__ = ("budget_tokens", "reserve_tokens", "strategy", "last_exchanges", "encoding", "instructions", "new_message", "context_etag", "since", "recall")
    BUDGET_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESERVE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    LAST_EXCHANGES_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTIONS_FIELD_NUMBER: _ClassVar[int]
    NEW_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_ETAG_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    RECALL_FIELD_NUMBER: _ClassVar[int]
    budget_tokens: int
    reserve_tokens: int
    strategy: _turn_pb2.Strategy
    last_exchanges: int
    encoding: _turn_pb2.Encoding
    instructions: str
    new_message: _turn_pb2.Message
    context_etag: str
    since: _turn_pb2.TurnPosition
    recall: RecallSpec
    def __init__(self, budget_tokens: _Optional[int] = ..., reserve_tokens: _Optional[int] = ..., strategy: _Optional[_Union[_turn_pb2.Strategy, str]] = ..., last_exchanges: _Optional[int] = ..., encoding: _Optional[_Union[_turn_pb2.Encoding, str]] = ..., instructions: _Optional[str] = ..., new_message: _Optional[_Union[_turn_pb2.Message, _Mapping]] = ..., context_etag: _Optional[str] = ..., since: _Optional[_Union[_turn_pb2.TurnPosition, _Mapping]] = ..., recall: _Optional[_Union[RecallSpec, _Mapping]] = ...) -> None: ...

class RecallSpec(_message.Message):
    __slots__ = ("budget_tokens", "across_sessions", "embedding", "query")
    BUDGET_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ACROSS_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    budget_tokens: int
    across_sessions: bool
    embedding: bytes
    query: str
    def __init__(self, budget_tokens: _Optional[int] = ..., across_sessions: _Optional[bool] = ..., embedding: _Optional[bytes] = ..., query: _Optional[str] = ...) -> None: ...

class ActiveContext(_message.Message):
    __slots__ = ("turns", "instructions", "given_instructions", "pins", "summaries", "recalled", "new_message", "tokens", "encoding", "strategy", "checkpoint", "context_etag", "not_modified", "delta", "window", "receipt", "state")
    TURNS_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTIONS_FIELD_NUMBER: _ClassVar[int]
    GIVEN_INSTRUCTIONS_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    SUMMARIES_FIELD_NUMBER: _ClassVar[int]
    RECALLED_FIELD_NUMBER: _ClassVar[int]
    NEW_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_ETAG_FIELD_NUMBER: _ClassVar[int]
    NOT_MODIFIED_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    turns: _containers.RepeatedCompositeFieldContainer[_turn_pb2.Turn]
    instructions: _turn_pb2.Turn
    given_instructions: str
    pins: _containers.RepeatedCompositeFieldContainer[_turn_pb2.PinnedFact]
    summaries: _containers.RepeatedCompositeFieldContainer[_turn_pb2.Turn]
    recalled: RecalledBlock
    new_message: _turn_pb2.Message
    tokens: ContextTokens
    encoding: _turn_pb2.Encoding
    strategy: _turn_pb2.Strategy
    checkpoint: CheckpointHeader
    context_etag: str
    not_modified: bool
    delta: bool
    window: _turn_pb2.SeqRange
    receipt: Receipt
    state: SessionState
    def __init__(self, turns: _Optional[_Iterable[_Union[_turn_pb2.Turn, _Mapping]]] = ..., instructions: _Optional[_Union[_turn_pb2.Turn, _Mapping]] = ..., given_instructions: _Optional[str] = ..., pins: _Optional[_Iterable[_Union[_turn_pb2.PinnedFact, _Mapping]]] = ..., summaries: _Optional[_Iterable[_Union[_turn_pb2.Turn, _Mapping]]] = ..., recalled: _Optional[_Union[RecalledBlock, _Mapping]] = ..., new_message: _Optional[_Union[_turn_pb2.Message, _Mapping]] = ..., tokens: _Optional[_Union[ContextTokens, _Mapping]] = ..., encoding: _Optional[_Union[_turn_pb2.Encoding, str]] = ..., strategy: _Optional[_Union[_turn_pb2.Strategy, str]] = ..., checkpoint: _Optional[_Union[CheckpointHeader, _Mapping]] = ..., context_etag: _Optional[str] = ..., not_modified: _Optional[bool] = ..., delta: _Optional[bool] = ..., window: _Optional[_Union[_turn_pb2.SeqRange, _Mapping]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ..., state: _Optional[_Union[SessionState, _Mapping]] = ...) -> None: ...

class RecalledBlock(_message.Message):
    __slots__ = ("text", "items")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    text: str
    items: _containers.RepeatedCompositeFieldContainer[RecalledTurn]
    def __init__(self, text: _Optional[str] = ..., items: _Optional[_Iterable[_Union[RecalledTurn, _Mapping]]] = ...) -> None: ...

class RecalledTurn(_message.Message):
    __slots__ = ("session_id", "position", "score")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    position: _turn_pb2.TurnPosition
    score: float
    def __init__(self, session_id: _Optional[str] = ..., position: _Optional[_Union[_turn_pb2.TurnPosition, _Mapping]] = ..., score: _Optional[float] = ...) -> None: ...

class ContextTokens(_message.Message):
    __slots__ = ("instructions", "pins", "summary", "tail", "recalled", "new_message", "framing", "total", "budget", "reserve", "transcript")
    INSTRUCTIONS_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIELD_NUMBER: _ClassVar[int]
    RECALLED_FIELD_NUMBER: _ClassVar[int]
    NEW_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FRAMING_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    TRANSCRIPT_FIELD_NUMBER: _ClassVar[int]
    instructions: int
    pins: int
    summary: int
    tail: int
    recalled: int
    new_message: int
    framing: int
    total: int
    budget: int
    reserve: int
    transcript: int
    def __init__(self, instructions: _Optional[int] = ..., pins: _Optional[int] = ..., summary: _Optional[int] = ..., tail: _Optional[int] = ..., recalled: _Optional[int] = ..., new_message: _Optional[int] = ..., framing: _Optional[int] = ..., total: _Optional[int] = ..., budget: _Optional[int] = ..., reserve: _Optional[int] = ..., transcript: _Optional[int] = ...) -> None: ...

class SessionState(_message.Message):
    __slots__ = ("flags", "mode", "metadata", "etag")
    class FlagsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bool
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bool] = ...) -> None: ...
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    flags: _containers.ScalarMap[str, bool]
    mode: str
    metadata: _containers.ScalarMap[str, str]
    etag: str
    def __init__(self, flags: _Optional[_Mapping[str, bool]] = ..., mode: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ..., etag: _Optional[str] = ...) -> None: ...

class CheckpointHeader(_message.Message):
    __slots__ = ("version", "replay_cursor", "epoch", "summarised", "tail_first_seq", "instructions_seq", "exchanges", "rule", "chain", "taken_at_unix_ms", "milestone", "digest")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REPLAY_CURSOR_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SUMMARISED_FIELD_NUMBER: _ClassVar[int]
    TAIL_FIRST_SEQ_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTIONS_SEQ_FIELD_NUMBER: _ClassVar[int]
    EXCHANGES_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    TAKEN_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    MILESTONE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    version: int
    replay_cursor: int
    epoch: int
    summarised: _turn_pb2.SeqRange
    tail_first_seq: int
    instructions_seq: int
    exchanges: int
    rule: int
    chain: bytes
    taken_at_unix_ms: int
    milestone: str
    digest: bytes
    def __init__(self, version: _Optional[int] = ..., replay_cursor: _Optional[int] = ..., epoch: _Optional[int] = ..., summarised: _Optional[_Union[_turn_pb2.SeqRange, _Mapping]] = ..., tail_first_seq: _Optional[int] = ..., instructions_seq: _Optional[int] = ..., exchanges: _Optional[int] = ..., rule: _Optional[int] = ..., chain: _Optional[bytes] = ..., taken_at_unix_ms: _Optional[int] = ..., milestone: _Optional[str] = ..., digest: _Optional[bytes] = ...) -> None: ...

class MissingRange(_message.Message):
    __slots__ = ("first_seq", "last_seq", "epoch", "reason", "possible_only")
    FIRST_SEQ_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQ_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    POSSIBLE_ONLY_FIELD_NUMBER: _ClassVar[int]
    first_seq: int
    last_seq: int
    epoch: int
    reason: MissingReason
    possible_only: bool
    def __init__(self, first_seq: _Optional[int] = ..., last_seq: _Optional[int] = ..., epoch: _Optional[int] = ..., reason: _Optional[_Union[MissingReason, str]] = ..., possible_only: _Optional[bool] = ...) -> None: ...

class StablePrefix(_message.Message):
    __slots__ = ("digest", "tokens", "turns")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    tokens: int
    turns: int
    def __init__(self, digest: _Optional[bytes] = ..., tokens: _Optional[int] = ..., turns: _Optional[int] = ...) -> None: ...

class CacheBreakpoint(_message.Message):
    __slots__ = ("provider", "after_seq", "prefix_tokens")
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    AFTER_SEQ_FIELD_NUMBER: _ClassVar[int]
    PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    provider: str
    after_seq: int
    prefix_tokens: int
    def __init__(self, provider: _Optional[str] = ..., after_seq: _Optional[int] = ..., prefix_tokens: _Optional[int] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("rung", "ownership", "verbatim", "summarised", "recalled", "omitted", "missing", "head", "cloud_seq", "stale_ms_max", "stale", "stable_prefix", "breakpoints", "summary_due", "notice", "reset_of", "node", "profile_head")
    RUNG_FIELD_NUMBER: _ClassVar[int]
    OWNERSHIP_FIELD_NUMBER: _ClassVar[int]
    VERBATIM_FIELD_NUMBER: _ClassVar[int]
    SUMMARISED_FIELD_NUMBER: _ClassVar[int]
    RECALLED_FIELD_NUMBER: _ClassVar[int]
    OMITTED_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    CLOUD_SEQ_FIELD_NUMBER: _ClassVar[int]
    STALE_MS_MAX_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    STABLE_PREFIX_FIELD_NUMBER: _ClassVar[int]
    BREAKPOINTS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_DUE_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    RESET_OF_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PROFILE_HEAD_FIELD_NUMBER: _ClassVar[int]
    rung: Rung
    ownership: Ownership
    verbatim: _containers.RepeatedCompositeFieldContainer[_turn_pb2.SeqRange]
    summarised: _containers.RepeatedCompositeFieldContainer[_turn_pb2.SeqRange]
    recalled: _containers.RepeatedCompositeFieldContainer[_turn_pb2.SeqRange]
    omitted: _containers.RepeatedCompositeFieldContainer[_turn_pb2.SeqRange]
    missing: _containers.RepeatedCompositeFieldContainer[MissingRange]
    head: _turn_pb2.TurnPosition
    cloud_seq: int
    stale_ms_max: int
    stale: bool
    stable_prefix: StablePrefix
    breakpoints: _containers.RepeatedCompositeFieldContainer[CacheBreakpoint]
    summary_due: _turn_pb2.SeqRange
    notice: str
    reset_of: str
    node: str
    profile_head: _turn_pb2.TurnPosition
    def __init__(self, rung: _Optional[_Union[Rung, str]] = ..., ownership: _Optional[_Union[Ownership, str]] = ..., verbatim: _Optional[_Iterable[_Union[_turn_pb2.SeqRange, _Mapping]]] = ..., summarised: _Optional[_Iterable[_Union[_turn_pb2.SeqRange, _Mapping]]] = ..., recalled: _Optional[_Iterable[_Union[_turn_pb2.SeqRange, _Mapping]]] = ..., omitted: _Optional[_Iterable[_Union[_turn_pb2.SeqRange, _Mapping]]] = ..., missing: _Optional[_Iterable[_Union[MissingRange, _Mapping]]] = ..., head: _Optional[_Union[_turn_pb2.TurnPosition, _Mapping]] = ..., cloud_seq: _Optional[int] = ..., stale_ms_max: _Optional[int] = ..., stale: _Optional[bool] = ..., stable_prefix: _Optional[_Union[StablePrefix, _Mapping]] = ..., breakpoints: _Optional[_Iterable[_Union[CacheBreakpoint, _Mapping]]] = ..., summary_due: _Optional[_Union[_turn_pb2.SeqRange, _Mapping]] = ..., notice: _Optional[str] = ..., reset_of: _Optional[str] = ..., node: _Optional[str] = ..., profile_head: _Optional[_Union[_turn_pb2.TurnPosition, _Mapping]] = ...) -> None: ...
