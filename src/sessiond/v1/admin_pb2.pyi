from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class NodePhase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NODE_PHASE_UNSPECIFIED: _ClassVar[NodePhase]
    NODE_PHASE_STARTING: _ClassVar[NodePhase]
    NODE_PHASE_SERVING: _ClassVar[NodePhase]
    NODE_PHASE_DRAINING: _ClassVar[NodePhase]
    NODE_PHASE_DRAINED: _ClassVar[NodePhase]
NODE_PHASE_UNSPECIFIED: NodePhase
NODE_PHASE_STARTING: NodePhase
NODE_PHASE_SERVING: NodePhase
NODE_PHASE_DRAINING: NodePhase
NODE_PHASE_DRAINED: NodePhase

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("version", "node", "incarnation", "phase", "started_at_unix_ms", "compiled_core", "hot", "cloud", "calls", "rungs", "group_commit", "resident_bytes", "turns_appended", "flush", "upkeep", "ownership", "workers", "old_readers")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    COMPILED_CORE_FIELD_NUMBER: _ClassVar[int]
    HOT_FIELD_NUMBER: _ClassVar[int]
    CLOUD_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    RUNGS_FIELD_NUMBER: _ClassVar[int]
    GROUP_COMMIT_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    TURNS_APPENDED_FIELD_NUMBER: _ClassVar[int]
    FLUSH_FIELD_NUMBER: _ClassVar[int]
    UPKEEP_FIELD_NUMBER: _ClassVar[int]
    OWNERSHIP_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    OLD_READERS_FIELD_NUMBER: _ClassVar[int]
    version: str
    node: str
    incarnation: bytes
    phase: NodePhase
    started_at_unix_ms: int
    compiled_core: bool
    hot: HotTierStatus
    cloud: CloudTierStatus
    calls: _containers.RepeatedCompositeFieldContainer[CallCount]
    rungs: _containers.RepeatedCompositeFieldContainer[RungCount]
    group_commit: GroupCommitStatus
    resident_bytes: int
    turns_appended: int
    flush: FlushStatus
    upkeep: UpkeepStatus
    ownership: OwnershipStatus
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    old_readers: _containers.RepeatedCompositeFieldContainer[ReaderStatus]
    def __init__(self, version: _Optional[str] = ..., node: _Optional[str] = ..., incarnation: _Optional[bytes] = ..., phase: _Optional[_Union[NodePhase, str]] = ..., started_at_unix_ms: _Optional[int] = ..., compiled_core: _Optional[bool] = ..., hot: _Optional[_Union[HotTierStatus, _Mapping]] = ..., cloud: _Optional[_Union[CloudTierStatus, _Mapping]] = ..., calls: _Optional[_Iterable[_Union[CallCount, _Mapping]]] = ..., rungs: _Optional[_Iterable[_Union[RungCount, _Mapping]]] = ..., group_commit: _Optional[_Union[GroupCommitStatus, _Mapping]] = ..., resident_bytes: _Optional[int] = ..., turns_appended: _Optional[int] = ..., flush: _Optional[_Union[FlushStatus, _Mapping]] = ..., upkeep: _Optional[_Union[UpkeepStatus, _Mapping]] = ..., ownership: _Optional[_Union[OwnershipStatus, _Mapping]] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., old_readers: _Optional[_Iterable[_Union[ReaderStatus, _Mapping]]] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("number", "pid", "restarts", "resident_bytes", "answered", "relayed", "commits", "appends", "hand_overs")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    RELAYED_FIELD_NUMBER: _ClassVar[int]
    COMMITS_FIELD_NUMBER: _ClassVar[int]
    APPENDS_FIELD_NUMBER: _ClassVar[int]
    HAND_OVERS_FIELD_NUMBER: _ClassVar[int]
    number: int
    pid: int
    restarts: int
    resident_bytes: int
    answered: int
    relayed: int
    commits: int
    appends: int
    hand_overs: int
    def __init__(self, number: _Optional[int] = ..., pid: _Optional[int] = ..., restarts: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., answered: _Optional[int] = ..., relayed: _Optional[int] = ..., commits: _Optional[int] = ..., appends: _Optional[int] = ..., hand_overs: _Optional[int] = ...) -> None: ...

class ReaderStatus(_message.Message):
    __slots__ = ("pid", "age_ms")
    PID_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    pid: int
    age_ms: int
    def __init__(self, pid: _Optional[int] = ..., age_ms: _Optional[int] = ...) -> None: ...

class OwnershipStatus(_message.Message):
    __slots__ = ("owned_sessions", "fenced_sessions", "claims", "steals", "fenced", "forwarded", "answered_for_others", "rescues", "watchers")
    class RescuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    OWNED_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    FENCED_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    CLAIMS_FIELD_NUMBER: _ClassVar[int]
    STEALS_FIELD_NUMBER: _ClassVar[int]
    FENCED_FIELD_NUMBER: _ClassVar[int]
    FORWARDED_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FOR_OTHERS_FIELD_NUMBER: _ClassVar[int]
    RESCUES_FIELD_NUMBER: _ClassVar[int]
    WATCHERS_FIELD_NUMBER: _ClassVar[int]
    owned_sessions: int
    fenced_sessions: int
    claims: int
    steals: int
    fenced: int
    forwarded: _containers.RepeatedCompositeFieldContainer[ForwardCount]
    answered_for_others: int
    rescues: _containers.ScalarMap[str, int]
    watchers: int
    def __init__(self, owned_sessions: _Optional[int] = ..., fenced_sessions: _Optional[int] = ..., claims: _Optional[int] = ..., steals: _Optional[int] = ..., fenced: _Optional[int] = ..., forwarded: _Optional[_Iterable[_Union[ForwardCount, _Mapping]]] = ..., answered_for_others: _Optional[int] = ..., rescues: _Optional[_Mapping[str, int]] = ..., watchers: _Optional[int] = ...) -> None: ...

class ForwardCount(_message.Message):
    __slots__ = ("node", "outcome", "count")
    NODE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    node: str
    outcome: str
    count: int
    def __init__(self, node: _Optional[str] = ..., outcome: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class FlushStatus(_message.Message):
    __slots__ = ("in_flight", "width", "failing_ms", "last_error", "commits", "merges")
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    FAILING_MS_FIELD_NUMBER: _ClassVar[int]
    LAST_ERROR_FIELD_NUMBER: _ClassVar[int]
    COMMITS_FIELD_NUMBER: _ClassVar[int]
    MERGES_FIELD_NUMBER: _ClassVar[int]
    in_flight: int
    width: int
    failing_ms: int
    last_error: str
    commits: int
    merges: int
    def __init__(self, in_flight: _Optional[int] = ..., width: _Optional[int] = ..., failing_ms: _Optional[int] = ..., last_error: _Optional[str] = ..., commits: _Optional[int] = ..., merges: _Optional[int] = ...) -> None: ...

class UpkeepStatus(_message.Message):
    __slots__ = ("released_sessions", "evicted_sessions", "archived_sessions", "deleted_sessions", "clock_ahead_ms", "last_error")
    RELEASED_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    EVICTED_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    ARCHIVED_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    DELETED_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    CLOCK_AHEAD_MS_FIELD_NUMBER: _ClassVar[int]
    LAST_ERROR_FIELD_NUMBER: _ClassVar[int]
    released_sessions: int
    evicted_sessions: int
    archived_sessions: int
    deleted_sessions: int
    clock_ahead_ms: int
    last_error: str
    def __init__(self, released_sessions: _Optional[int] = ..., evicted_sessions: _Optional[int] = ..., archived_sessions: _Optional[int] = ..., deleted_sessions: _Optional[int] = ..., clock_ahead_ms: _Optional[int] = ..., last_error: _Optional[str] = ...) -> None: ...

class HotTierStatus(_message.Message):
    __slots__ = ("sessions", "map_used_bytes", "map_size_bytes", "dirty_sessions", "oldest_dirty_ms", "path", "readers")
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MAP_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAP_SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIRTY_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    OLDEST_DIRTY_MS_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    READERS_FIELD_NUMBER: _ClassVar[int]
    sessions: int
    map_used_bytes: int
    map_size_bytes: int
    dirty_sessions: int
    oldest_dirty_ms: int
    path: str
    readers: int
    def __init__(self, sessions: _Optional[int] = ..., map_used_bytes: _Optional[int] = ..., map_size_bytes: _Optional[int] = ..., dirty_sessions: _Optional[int] = ..., oldest_dirty_ms: _Optional[int] = ..., path: _Optional[str] = ..., readers: _Optional[int] = ...) -> None: ...

class CloudTierStatus(_message.Message):
    __slots__ = ("url", "store_id", "reachable", "last_error", "lease_valid", "requests", "objects")
    URL_FIELD_NUMBER: _ClassVar[int]
    STORE_ID_FIELD_NUMBER: _ClassVar[int]
    REACHABLE_FIELD_NUMBER: _ClassVar[int]
    LAST_ERROR_FIELD_NUMBER: _ClassVar[int]
    LEASE_VALID_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    url: str
    store_id: bytes
    reachable: bool
    last_error: str
    lease_valid: bool
    requests: _containers.RepeatedCompositeFieldContainer[StoreRequestCount]
    objects: _containers.RepeatedCompositeFieldContainer[StoreObjectCount]
    def __init__(self, url: _Optional[str] = ..., store_id: _Optional[bytes] = ..., reachable: _Optional[bool] = ..., last_error: _Optional[str] = ..., lease_valid: _Optional[bool] = ..., requests: _Optional[_Iterable[_Union[StoreRequestCount, _Mapping]]] = ..., objects: _Optional[_Iterable[_Union[StoreObjectCount, _Mapping]]] = ...) -> None: ...

class StoreObjectCount(_message.Message):
    __slots__ = ("kind", "object", "count")
    KIND_FIELD_NUMBER: _ClassVar[int]
    OBJECT_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    kind: str
    object: str
    count: int
    def __init__(self, kind: _Optional[str] = ..., object: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class StoreRequestCount(_message.Message):
    __slots__ = ("kind", "outcome", "count", "bytes")
    KIND_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    kind: str
    outcome: str
    count: int
    bytes: int
    def __init__(self, kind: _Optional[str] = ..., outcome: _Optional[str] = ..., count: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class CallCount(_message.Message):
    __slots__ = ("method", "status", "reason", "count")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    method: str
    status: str
    reason: str
    count: int
    def __init__(self, method: _Optional[str] = ..., status: _Optional[str] = ..., reason: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class RungCount(_message.Message):
    __slots__ = ("rung", "count")
    RUNG_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    rung: str
    count: int
    def __init__(self, rung: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class GroupCommitStatus(_message.Message):
    __slots__ = ("commits", "appends", "group_max")
    COMMITS_FIELD_NUMBER: _ClassVar[int]
    APPENDS_FIELD_NUMBER: _ClassVar[int]
    GROUP_MAX_FIELD_NUMBER: _ClassVar[int]
    commits: int
    appends: int
    group_max: int
    def __init__(self, commits: _Optional[int] = ..., appends: _Optional[int] = ..., group_max: _Optional[int] = ...) -> None: ...

class FlushRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class FlushResponse(_message.Message):
    __slots__ = ("flushed_sessions", "failed_sessions", "failures")
    class FailuresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    FLUSHED_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    FAILED_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    flushed_sessions: int
    failed_sessions: int
    failures: _containers.ScalarMap[str, int]
    def __init__(self, flushed_sessions: _Optional[int] = ..., failed_sessions: _Optional[int] = ..., failures: _Optional[_Mapping[str, int]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("grace_ms", "shut_down")
    GRACE_MS_FIELD_NUMBER: _ClassVar[int]
    SHUT_DOWN_FIELD_NUMBER: _ClassVar[int]
    grace_ms: int
    shut_down: bool
    def __init__(self, grace_ms: _Optional[int] = ..., shut_down: _Optional[bool] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("remaining_sessions", "released_sessions", "failed_sessions", "done", "clean", "failures")
    class FailuresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    REMAINING_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    RELEASED_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    FAILED_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    CLEAN_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    remaining_sessions: int
    released_sessions: int
    failed_sessions: int
    done: bool
    clean: bool
    failures: _containers.ScalarMap[str, int]
    def __init__(self, remaining_sessions: _Optional[int] = ..., released_sessions: _Optional[int] = ..., failed_sessions: _Optional[int] = ..., done: _Optional[bool] = ..., clean: _Optional[bool] = ..., failures: _Optional[_Mapping[str, int]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("session_ids",)
    SESSION_IDS_FIELD_NUMBER: _ClassVar[int]
    session_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, session_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ("released_sessions", "failures")
    class FailuresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    RELEASED_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    released_sessions: int
    failures: _containers.ScalarMap[str, str]
    def __init__(self, released_sessions: _Optional[int] = ..., failures: _Optional[_Mapping[str, str]] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ("session_id", "deep")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    DEEP_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    deep: bool
    def __init__(self, session_id: _Optional[str] = ..., deep: _Optional[bool] = ...) -> None: ...

class VerifyResponse(_message.Message):
    __slots__ = ("checked_sessions", "total_sessions", "invariant", "session_id", "explanation", "done")
    CHECKED_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    INVARIANT_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    checked_sessions: int
    total_sessions: int
    invariant: str
    session_id: str
    explanation: str
    done: bool
    def __init__(self, checked_sessions: _Optional[int] = ..., total_sessions: _Optional[int] = ..., invariant: _Optional[str] = ..., session_id: _Optional[str] = ..., explanation: _Optional[str] = ..., done: _Optional[bool] = ...) -> None: ...

class EraseRequest(_message.Message):
    __slots__ = ("session_id", "user_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    user_id: str
    def __init__(self, session_id: _Optional[str] = ..., user_id: _Optional[str] = ...) -> None: ...

class EraseResponse(_message.Message):
    __slots__ = ("erase_id", "complete", "waiting_nodes", "removed_objects")
    ERASE_ID_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    WAITING_NODES_FIELD_NUMBER: _ClassVar[int]
    REMOVED_OBJECTS_FIELD_NUMBER: _ClassVar[int]
    erase_id: str
    complete: bool
    waiting_nodes: _containers.RepeatedScalarFieldContainer[str]
    removed_objects: int
    def __init__(self, erase_id: _Optional[str] = ..., complete: _Optional[bool] = ..., waiting_nodes: _Optional[_Iterable[str]] = ..., removed_objects: _Optional[int] = ...) -> None: ...
