from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TurnKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TURN_KIND_UNSPECIFIED: _ClassVar[TurnKind]
    TURN_KIND_MESSAGE: _ClassVar[TurnKind]
    TURN_KIND_SUMMARY: _ClassVar[TurnKind]
    TURN_KIND_STATE: _ClassVar[TurnKind]
    TURN_KIND_MILESTONE: _ClassVar[TurnKind]
    TURN_KIND_REWIND: _ClassVar[TurnKind]

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_SYSTEM: _ClassVar[Role]
    ROLE_USER: _ClassVar[Role]
    ROLE_ASSISTANT: _ClassVar[Role]
    ROLE_TOOL: _ClassVar[Role]
    ROLE_DEVELOPER: _ClassVar[Role]

class TurnStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TURN_STATUS_UNSPECIFIED: _ClassVar[TurnStatus]
    TURN_STATUS_COMPLETE: _ClassVar[TurnStatus]
    TURN_STATUS_INTERRUPTED: _ClassVar[TurnStatus]
    TURN_STATUS_CANCELLED: _ClassVar[TurnStatus]

class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENCODING_UNSPECIFIED: _ClassVar[Encoding]
    ENCODING_O200K_BASE: _ClassVar[Encoding]
    ENCODING_CL100K_BASE: _ClassVar[Encoding]

class TokenSource(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TOKEN_SOURCE_UNSPECIFIED: _ClassVar[TokenSource]
    TOKEN_SOURCE_COUNTED: _ClassVar[TokenSource]
    TOKEN_SOURCE_SUPPLIED: _ClassVar[TokenSource]

class SourceFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SOURCE_FORMAT_UNSPECIFIED: _ClassVar[SourceFormat]
    SOURCE_FORMAT_OPENAI_CHAT: _ClassVar[SourceFormat]
    SOURCE_FORMAT_ANTHROPIC: _ClassVar[SourceFormat]

class ContentShape(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONTENT_SHAPE_UNSPECIFIED: _ClassVar[ContentShape]
    CONTENT_SHAPE_ABSENT: _ClassVar[ContentShape]
    CONTENT_SHAPE_NULL: _ClassVar[ContentShape]
    CONTENT_SHAPE_STRING: _ClassVar[ContentShape]
    CONTENT_SHAPE_LIST: _ClassVar[ContentShape]

class SummarySource(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SUMMARY_SOURCE_UNSPECIFIED: _ClassVar[SummarySource]
    SUMMARY_SOURCE_GATEWAY: _ClassVar[SummarySource]
    SUMMARY_SOURCE_MODEL: _ClassVar[SummarySource]
    SUMMARY_SOURCE_EXTRACTIVE: _ClassVar[SummarySource]

class PinScope(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PIN_SCOPE_UNSPECIFIED: _ClassVar[PinScope]
    PIN_SCOPE_SESSION: _ClassVar[PinScope]
    PIN_SCOPE_USER: _ClassVar[PinScope]

class RewindReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REWIND_REASON_UNSPECIFIED: _ClassVar[RewindReason]
    REWIND_REASON_EDIT: _ClassVar[RewindReason]
    REWIND_REASON_REGENERATE: _ClassVar[RewindReason]
    REWIND_REASON_UNDO: _ClassVar[RewindReason]

class ExpiryMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXPIRY_MODE_UNSPECIFIED: _ClassVar[ExpiryMode]
    EXPIRY_MODE_SLIDING: _ClassVar[ExpiryMode]
    EXPIRY_MODE_FIXED: _ClassVar[ExpiryMode]

class ExpiryAction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXPIRY_ACTION_UNSPECIFIED: _ClassVar[ExpiryAction]
    EXPIRY_ACTION_ARCHIVE: _ClassVar[ExpiryAction]
    EXPIRY_ACTION_DELETE: _ClassVar[ExpiryAction]

class Durability(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DURABILITY_UNSPECIFIED: _ClassVar[Durability]
    DURABILITY_EDGE: _ClassVar[Durability]
    DURABILITY_CLOUD: _ClassVar[Durability]

class Strategy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STRATEGY_UNSPECIFIED: _ClassVar[Strategy]
    STRATEGY_FULL: _ClassVar[Strategy]
    STRATEGY_LAST_N: _ClassVar[Strategy]
    STRATEGY_SUMMARY: _ClassVar[Strategy]
    STRATEGY_HYBRID: _ClassVar[Strategy]
    STRATEGY_RECALL: _ClassVar[Strategy]
TURN_KIND_UNSPECIFIED: TurnKind
TURN_KIND_MESSAGE: TurnKind
TURN_KIND_SUMMARY: TurnKind
TURN_KIND_STATE: TurnKind
TURN_KIND_MILESTONE: TurnKind
TURN_KIND_REWIND: TurnKind
ROLE_UNSPECIFIED: Role
ROLE_SYSTEM: Role
ROLE_USER: Role
ROLE_ASSISTANT: Role
ROLE_TOOL: Role
ROLE_DEVELOPER: Role
TURN_STATUS_UNSPECIFIED: TurnStatus
TURN_STATUS_COMPLETE: TurnStatus
TURN_STATUS_INTERRUPTED: TurnStatus
TURN_STATUS_CANCELLED: TurnStatus
ENCODING_UNSPECIFIED: Encoding
ENCODING_O200K_BASE: Encoding
ENCODING_CL100K_BASE: Encoding
TOKEN_SOURCE_UNSPECIFIED: TokenSource
TOKEN_SOURCE_COUNTED: TokenSource
TOKEN_SOURCE_SUPPLIED: TokenSource
SOURCE_FORMAT_UNSPECIFIED: SourceFormat
SOURCE_FORMAT_OPENAI_CHAT: SourceFormat
SOURCE_FORMAT_ANTHROPIC: SourceFormat
CONTENT_SHAPE_UNSPECIFIED: ContentShape
CONTENT_SHAPE_ABSENT: ContentShape
CONTENT_SHAPE_NULL: ContentShape
CONTENT_SHAPE_STRING: ContentShape
CONTENT_SHAPE_LIST: ContentShape
SUMMARY_SOURCE_UNSPECIFIED: SummarySource
SUMMARY_SOURCE_GATEWAY: SummarySource
SUMMARY_SOURCE_MODEL: SummarySource
SUMMARY_SOURCE_EXTRACTIVE: SummarySource
PIN_SCOPE_UNSPECIFIED: PinScope
PIN_SCOPE_SESSION: PinScope
PIN_SCOPE_USER: PinScope
REWIND_REASON_UNSPECIFIED: RewindReason
REWIND_REASON_EDIT: RewindReason
REWIND_REASON_REGENERATE: RewindReason
REWIND_REASON_UNDO: RewindReason
EXPIRY_MODE_UNSPECIFIED: ExpiryMode
EXPIRY_MODE_SLIDING: ExpiryMode
EXPIRY_MODE_FIXED: ExpiryMode
EXPIRY_ACTION_UNSPECIFIED: ExpiryAction
EXPIRY_ACTION_ARCHIVE: ExpiryAction
EXPIRY_ACTION_DELETE: ExpiryAction
DURABILITY_UNSPECIFIED: Durability
DURABILITY_EDGE: Durability
DURABILITY_CLOUD: Durability
STRATEGY_UNSPECIFIED: Strategy
STRATEGY_FULL: Strategy
STRATEGY_LAST_N: Strategy
STRATEGY_SUMMARY: Strategy
STRATEGY_HYBRID: Strategy
STRATEGY_RECALL: Strategy

class TurnPosition(_message.Message):
    __slots__ = ("epoch", "seq", "chain")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    seq: int
    chain: bytes
    def __init__(self, epoch: _Optional[int] = ..., seq: _Optional[int] = ..., chain: _Optional[bytes] = ...) -> None: ...

class SeqRange(_message.Message):
    __slots__ = ("first_seq", "last_seq")
    FIRST_SEQ_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQ_FIELD_NUMBER: _ClassVar[int]
    first_seq: int
    last_seq: int
    def __init__(self, first_seq: _Optional[int] = ..., last_seq: _Optional[int] = ...) -> None: ...

class TokenCount(_message.Message):
    __slots__ = ("cumulative", "tokens", "source")
    CUMULATIVE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    cumulative: int
    tokens: int
    source: TokenSource
    def __init__(self, cumulative: _Optional[int] = ..., tokens: _Optional[int] = ..., source: _Optional[_Union[TokenSource, str]] = ...) -> None: ...

class Turn(_message.Message):
    __slots__ = ("seq", "epoch", "append_time_unix_ms", "kind", "role", "status", "flags", "prev_live_seq", "o200k", "cl100k", "spare_encoding", "body_digest", "chain", "crc32c", "turn_id", "message", "summary", "state", "milestone", "rewind", "meta", "derived")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    APPEND_TIME_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    PREV_LIVE_SEQ_FIELD_NUMBER: _ClassVar[int]
    O200K_FIELD_NUMBER: _ClassVar[int]
    CL100K_FIELD_NUMBER: _ClassVar[int]
    SPARE_ENCODING_FIELD_NUMBER: _ClassVar[int]
    BODY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    TURN_ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MILESTONE_FIELD_NUMBER: _ClassVar[int]
    REWIND_FIELD_NUMBER: _ClassVar[int]
    META_FIELD_NUMBER: _ClassVar[int]
    DERIVED_FIELD_NUMBER: _ClassVar[int]
    seq: int
    epoch: int
    append_time_unix_ms: int
    kind: TurnKind
    role: Role
    status: TurnStatus
    flags: int
    prev_live_seq: int
    o200k: TokenCount
    cl100k: TokenCount
    spare_encoding: TokenCount
    body_digest: bytes
    chain: bytes
    crc32c: int
    turn_id: str
    message: Message
    summary: Summary
    state: StateChange
    milestone: Milestone
    rewind: Rewind
    meta: TurnMeta
    derived: bytes
    def __init__(self, seq: _Optional[int] = ..., epoch: _Optional[int] = ..., append_time_unix_ms: _Optional[int] = ..., kind: _Optional[_Union[TurnKind, str]] = ..., role: _Optional[_Union[Role, str]] = ..., status: _Optional[_Union[TurnStatus, str]] = ..., flags: _Optional[int] = ..., prev_live_seq: _Optional[int] = ..., o200k: _Optional[_Union[TokenCount, _Mapping]] = ..., cl100k: _Optional[_Union[TokenCount, _Mapping]] = ..., spare_encoding: _Optional[_Union[TokenCount, _Mapping]] = ..., body_digest: _Optional[bytes] = ..., chain: _Optional[bytes] = ..., crc32c: _Optional[int] = ..., turn_id: _Optional[str] = ..., message: _Optional[_Union[Message, _Mapping]] = ..., summary: _Optional[_Union[Summary, _Mapping]] = ..., state: _Optional[_Union[StateChange, _Mapping]] = ..., milestone: _Optional[_Union[Milestone, _Mapping]] = ..., rewind: _Optional[_Union[Rewind, _Mapping]] = ..., meta: _Optional[_Union[TurnMeta, _Mapping]] = ..., derived: _Optional[bytes] = ...) -> None: ...

class TurnInput(_message.Message):
    __slots__ = ("turn_id", "role", "status", "supplied_tokens", "message", "summary", "state", "milestone", "rewind", "meta")
    TURN_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    SUPPLIED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MILESTONE_FIELD_NUMBER: _ClassVar[int]
    REWIND_FIELD_NUMBER: _ClassVar[int]
    META_FIELD_NUMBER: _ClassVar[int]
    turn_id: str
    role: Role
    status: TurnStatus
    supplied_tokens: _containers.RepeatedCompositeFieldContainer[SuppliedTokens]
    message: Message
    summary: Summary
    state: StateChange
    milestone: Milestone
    rewind: Rewind
    meta: TurnMeta
    def __init__(self, turn_id: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., status: _Optional[_Union[TurnStatus, str]] = ..., supplied_tokens: _Optional[_Iterable[_Union[SuppliedTokens, _Mapping]]] = ..., message: _Optional[_Union[Message, _Mapping]] = ..., summary: _Optional[_Union[Summary, _Mapping]] = ..., state: _Optional[_Union[StateChange, _Mapping]] = ..., milestone: _Optional[_Union[Milestone, _Mapping]] = ..., rewind: _Optional[_Union[Rewind, _Mapping]] = ..., meta: _Optional[_Union[TurnMeta, _Mapping]] = ...) -> None: ...

class SuppliedTokens(_message.Message):
    __slots__ = ("encoding", "tokens")
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    encoding: Encoding
    tokens: int
    def __init__(self, encoding: _Optional[_Union[Encoding, str]] = ..., tokens: _Optional[int] = ...) -> None: ...

class Message(_message.Message):
    __slots__ = ("name", "parts", "source_format", "content_shape", "extra_json", "original_json")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FORMAT_FIELD_NUMBER: _ClassVar[int]
    CONTENT_SHAPE_FIELD_NUMBER: _ClassVar[int]
    EXTRA_JSON_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_JSON_FIELD_NUMBER: _ClassVar[int]
    name: str
    parts: _containers.RepeatedCompositeFieldContainer[Part]
    source_format: SourceFormat
    content_shape: ContentShape
    extra_json: bytes
    original_json: bytes
    def __init__(self, name: _Optional[str] = ..., parts: _Optional[_Iterable[_Union[Part, _Mapping]]] = ..., source_format: _Optional[_Union[SourceFormat, str]] = ..., content_shape: _Optional[_Union[ContentShape, str]] = ..., extra_json: _Optional[bytes] = ..., original_json: _Optional[bytes] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("text", "refusal", "tool_call", "tool_result", "attachment", "opaque", "extra_json")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALL_FIELD_NUMBER: _ClassVar[int]
    TOOL_RESULT_FIELD_NUMBER: _ClassVar[int]
    ATTACHMENT_FIELD_NUMBER: _ClassVar[int]
    OPAQUE_FIELD_NUMBER: _ClassVar[int]
    EXTRA_JSON_FIELD_NUMBER: _ClassVar[int]
    text: str
    refusal: str
    tool_call: ToolCall
    tool_result: ToolResult
    attachment: Attachment
    opaque: OpaqueItem
    extra_json: bytes
    def __init__(self, text: _Optional[str] = ..., refusal: _Optional[str] = ..., tool_call: _Optional[_Union[ToolCall, _Mapping]] = ..., tool_result: _Optional[_Union[ToolResult, _Mapping]] = ..., attachment: _Optional[_Union[Attachment, _Mapping]] = ..., opaque: _Optional[_Union[OpaqueItem, _Mapping]] = ..., extra_json: _Optional[bytes] = ...) -> None: ...

class ToolCall(_message.Message):
    __slots__ = ("call_id", "name", "arguments")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    call_id: str
    name: str
    arguments: str
    def __init__(self, call_id: _Optional[str] = ..., name: _Optional[str] = ..., arguments: _Optional[str] = ...) -> None: ...

class ToolResult(_message.Message):
    __slots__ = ("call_id", "parts", "is_error", "content_shape")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    IS_ERROR_FIELD_NUMBER: _ClassVar[int]
    CONTENT_SHAPE_FIELD_NUMBER: _ClassVar[int]
    call_id: str
    parts: _containers.RepeatedCompositeFieldContainer[Part]
    is_error: bool
    content_shape: ContentShape
    def __init__(self, call_id: _Optional[str] = ..., parts: _Optional[_Iterable[_Union[Part, _Mapping]]] = ..., is_error: _Optional[bool] = ..., content_shape: _Optional[_Union[ContentShape, str]] = ...) -> None: ...

class Attachment(_message.Message):
    __slots__ = ("uri", "sha256", "media_type", "tokens", "alt_text")
    URI_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    MEDIA_TYPE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ALT_TEXT_FIELD_NUMBER: _ClassVar[int]
    uri: str
    sha256: bytes
    media_type: str
    tokens: int
    alt_text: str
    def __init__(self, uri: _Optional[str] = ..., sha256: _Optional[bytes] = ..., media_type: _Optional[str] = ..., tokens: _Optional[int] = ..., alt_text: _Optional[str] = ...) -> None: ...

class OpaqueItem(_message.Message):
    __slots__ = ("origin", "data", "tokens")
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    origin: str
    data: bytes
    tokens: int
    def __init__(self, origin: _Optional[str] = ..., data: _Optional[bytes] = ..., tokens: _Optional[int] = ...) -> None: ...

class TurnMeta(_message.Message):
    __slots__ = ("device_id", "model", "provider", "usage", "time_to_first_token_ms", "created_at_unix_ms", "traceparent", "labels")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROVIDER_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_FIRST_TOKEN_MS_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    model: str
    provider: str
    usage: Usage
    time_to_first_token_ms: int
    created_at_unix_ms: int
    traceparent: str
    labels: _containers.ScalarMap[str, str]
    def __init__(self, device_id: _Optional[str] = ..., model: _Optional[str] = ..., provider: _Optional[str] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., time_to_first_token_ms: _Optional[int] = ..., created_at_unix_ms: _Optional[int] = ..., traceparent: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "cached_tokens", "output_tokens", "cost_usd_micros")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COST_USD_MICROS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    cost_usd_micros: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., cost_usd_micros: _Optional[int] = ...) -> None: ...

class Summary(_message.Message):
    __slots__ = ("text", "covered", "covered_chain", "source", "model", "usage")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    COVERED_FIELD_NUMBER: _ClassVar[int]
    COVERED_CHAIN_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    text: str
    covered: SeqRange
    covered_chain: bytes
    source: SummarySource
    model: str
    usage: Usage
    def __init__(self, text: _Optional[str] = ..., covered: _Optional[_Union[SeqRange, _Mapping]] = ..., covered_chain: _Optional[bytes] = ..., source: _Optional[_Union[SummarySource, str]] = ..., model: _Optional[str] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ...) -> None: ...

class StateChange(_message.Message):
    __slots__ = ("flags", "mode", "metadata", "metadata_removed", "pins", "pins_removed", "policy")
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
    METADATA_REMOVED_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    PINS_REMOVED_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    flags: _containers.ScalarMap[str, bool]
    mode: str
    metadata: _containers.ScalarMap[str, str]
    metadata_removed: _containers.RepeatedScalarFieldContainer[str]
    pins: _containers.RepeatedCompositeFieldContainer[PinnedFact]
    pins_removed: _containers.RepeatedScalarFieldContainer[str]
    policy: SessionPolicy
    def __init__(self, flags: _Optional[_Mapping[str, bool]] = ..., mode: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ..., metadata_removed: _Optional[_Iterable[str]] = ..., pins: _Optional[_Iterable[_Union[PinnedFact, _Mapping]]] = ..., pins_removed: _Optional[_Iterable[str]] = ..., policy: _Optional[_Union[SessionPolicy, _Mapping]] = ...) -> None: ...

class PinnedFact(_message.Message):
    __slots__ = ("key", "value", "scope", "set_at")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    SET_AT_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: str
    scope: PinScope
    set_at: TurnPosition
    def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ..., scope: _Optional[_Union[PinScope, str]] = ..., set_at: _Optional[_Union[TurnPosition, _Mapping]] = ...) -> None: ...

class Milestone(_message.Message):
    __slots__ = ("label", "note")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    label: str
    note: str
    def __init__(self, label: _Optional[str] = ..., note: _Optional[str] = ...) -> None: ...

class Rewind(_message.Message):
    __slots__ = ("to_seq", "reason")
    TO_SEQ_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    to_seq: int
    reason: RewindReason
    def __init__(self, to_seq: _Optional[int] = ..., reason: _Optional[_Union[RewindReason, str]] = ...) -> None: ...

class SessionPolicy(_message.Message):
    __slots__ = ("min_durability", "strategy", "encoding", "budget_tokens", "expiry", "pins_budget_tokens")
    MIN_DURABILITY_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    BUDGET_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXPIRY_FIELD_NUMBER: _ClassVar[int]
    PINS_BUDGET_TOKENS_FIELD_NUMBER: _ClassVar[int]
    min_durability: Durability
    strategy: Strategy
    encoding: Encoding
    budget_tokens: int
    expiry: Expiry
    pins_budget_tokens: int
    def __init__(self, min_durability: _Optional[_Union[Durability, str]] = ..., strategy: _Optional[_Union[Strategy, str]] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., budget_tokens: _Optional[int] = ..., expiry: _Optional[_Union[Expiry, _Mapping]] = ..., pins_budget_tokens: _Optional[int] = ...) -> None: ...

class Expiry(_message.Message):
    __slots__ = ("ttl_ms", "mode", "action")
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    ttl_ms: int
    mode: ExpiryMode
    action: ExpiryAction
    def __init__(self, ttl_ms: _Optional[int] = ..., mode: _Optional[_Union[ExpiryMode, str]] = ..., action: _Optional[_Union[ExpiryAction, str]] = ...) -> None: ...
