"""Every way in which sessiond says no: seven kinds, one table of reasons, a remedy for each.

Nothing here logs, and nothing here knows of gRPC: `transport` turns a kind into a status, `cli` into an exit code.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class SessiondError(Exception):
    """One refusal: what happened, to what, and what the caller should do next.

    reason: a key of REASONS. message: one sentence with the offending value. remedy: overrides the table's sentence.
    metadata: offending ids and figures as strings. fields: (request field path, what is wrong with it) pairs.
    retry_after_ms: set only where a retry can help.
    """

    reason: str
    message: str
    metadata: dict[str, str] = field(default_factory=dict)
    fields: list[tuple[str, str]] = field(default_factory=list)
    retry_after_ms: int | None = None
    remedy: str = ""

    def __post_init__(self) -> None:
        known = REASONS[self.reason]
        if not isinstance(self, known.kind):
            raise TypeError(f"{self.reason} is of kind {known.kind.__name__}, not {type(self).__name__}")
        self.remedy = self.remedy or known.remedy
        if self.retry_after_ms is None:
            self.retry_after_ms = known.retry_after_ms
        super().__init__(self.reason)

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


def reason_of(error: BaseException) -> str:
    """A short name of what went wrong, for a status: a defect is named by its type."""
    return error.reason if isinstance(error, SessiondError) else type(error).__name__


class NotFound(SessiondError):
    """There is no such thing, and we are sure of it."""


class Conflict(SessiondError):
    """Somebody else was first, or the same key names something else."""


class Invalid(SessiondError):
    """The request or the configuration can't be right, however often it is sent."""


class Unavailable(SessiondError):
    """It can't be done now; waiting can help."""


class Corrupt(SessiondError):
    """Bytes that were read back do not verify, or a promise was found broken; waiting does not help."""


class Exhausted(SessiondError):
    """A named limit is reached."""


class Denied(SessiondError):
    """The caller may not do this."""


class Unimplemented(SessiondError):
    """The contract has it, this version does not serve it."""


@dataclass(frozen=True)
class Reason:
    """One row of docs/errors.md. status: a google.rpc.Code name. retry_after_ms: 0 where a retry can't help."""

    kind: type[SessiondError]
    status: str
    remedy: str
    retry_after_ms: int | None = None


_MOVE_HOT_ASIDE = (
    "Stop the daemon, run sessiond repair and start it again: it moves only what is damaged aside,"
    " and those sessions come back from the cloud tier and say what may be missing."
)

REASONS: dict[str, Reason] = {
    # requests
    "MALFORMED_REQUEST": Reason(Invalid, "INVALID_ARGUMENT", "Send a message of the published proto."),
    "INVALID_UTF8": Reason(Invalid, "INVALID_ARGUMENT", "Send text as UTF-8; put other bytes into an opaque part."),
    "REQUEST_TOO_LARGE": Reason(
        Invalid, "INVALID_ARGUMENT", "Send fewer turns per call, or keep large content elsewhere and attach its URI."
    ),
    "INVALID_SESSION_ID": Reason(
        Invalid,
        "INVALID_ARGUMENT",
        "Use 1 to 128 bytes of A-Z a-z 0-9 . _ : @ -, starting with a letter or digit.",
    ),
    "INVALID_USER_ID": Reason(Invalid, "INVALID_ARGUMENT", "Use at most 256 bytes of printable text for the user id."),
    "INVALID_TURN_ID": Reason(
        Invalid, "INVALID_ARGUMENT", "Mint one turn_id of 1 to 128 bytes per turn and send it again on every retry."
    ),
    "INVALID_TURN": Reason(Invalid, "INVALID_ARGUMENT", "Correct the named field; nothing was appended."),
    "EMPTY_TURN": Reason(
        Invalid, "INVALID_ARGUMENT", "Give the turn a body with content; only a tool result may be empty."
    ),
    "NO_TURNS": Reason(Invalid, "INVALID_ARGUMENT", "Send 1 to 256 turns."),
    "TURN_TOO_LARGE": Reason(
        Invalid, "INVALID_ARGUMENT", "Shorten the turn, or keep large content elsewhere and attach its URI."
    ),
    "TOOL_RESULT_WITHOUT_CALL": Reason(
        Invalid,
        "INVALID_ARGUMENT",
        "Append the assistant turn with this call first. A user message closes calls that were not answered.",
    ),
    "TOKENIZER_FAILED": Reason(
        Invalid, "INVALID_ARGUMENT", "Break up the very long run in the text, or supply the turn's token counts."
    ),
    "INVALID_BUDGET": Reason(
        Invalid, "INVALID_ARGUMENT", "Give a budget_tokens above 0 and above reserve_tokens, or set one in the policy."
    ),
    "BUDGET_TOO_SMALL": Reason(
        Invalid, "INVALID_ARGUMENT", "Raise budget_tokens to at least the named minimum, or reserve less."
    ),
    "INVALID_CONTEXT": Reason(Invalid, "INVALID_ARGUMENT", "Correct the named field."),
    "INVALID_PAGE_TOKEN": Reason(
        Invalid, "INVALID_ARGUMENT", "Start again without a page token; tokens belong to one session and one query."
    ),
    "INVALID_PAGE_SIZE": Reason(Invalid, "INVALID_ARGUMENT", "Use a page size within the documented range."),
    "INVALID_BATCH": Reason(Invalid, "INVALID_ARGUMENT", "Send 1 to 256 requests per call; nothing was done."),
    "INVALID_STATE_CHANGE": Reason(Invalid, "INVALID_ARGUMENT", "Correct the named field; nothing was changed."),
    "INVALID_POLICY": Reason(Invalid, "INVALID_ARGUMENT", "Correct the named field of the policy."),
    "INVALID_BLOB": Reason(Invalid, "INVALID_ARGUMENT", "Correct the named field; nothing was written."),
    "BLOB_TOO_LARGE": Reason(
        Invalid, "INVALID_ARGUMENT", "Split the content over several keys, or keep it elsewhere and store its URI."
    ),
    "INVALID_WRITE_ID": Reason(
        Invalid, "INVALID_ARGUMENT", "Mint one write_id of 1 to 128 bytes per write and send it again on every retry."
    ),
    "INVALID_REWIND": Reason(
        Invalid, "INVALID_ARGUMENT", "Rewind to a turn that is in force: at or below the head and not superseded."
    ),
    "INVALID_FORK": Reason(
        Invalid, "INVALID_ARGUMENT", "Fork at a turn from 1 to the head, or at a checkpoint that ListCheckpoints names."
    ),
    "NOT_SERVED_YET": Reason(Unimplemented, "UNIMPLEMENTED", "Use a release that serves this call."),
    # sessions
    "SESSION_NOT_FOUND": Reason(
        NotFound, "NOT_FOUND", "Check the session id and the user, or make the session with CreateSession."
    ),
    "SESSION_EXISTS": Reason(Conflict, "ALREADY_EXISTS", "Choose another session id."),
    "SESSION_DELETED": Reason(
        NotFound, "NOT_FOUND", "The id of a deleted session is never usable again; choose another."
    ),
    "TURN_ID_REUSED": Reason(
        Conflict, "ALREADY_EXISTS", "Mint a new turn_id for new content; send a retry with the same content."
    ),
    "EXPECTED_MISMATCH": Reason(
        Conflict, "ABORTED", "Read the turns after your head with ListTurns, then append with the new head."
    ),
    "STATE_ETAG_MISMATCH": Reason(
        Conflict, "ABORTED", "Read the session again and repeat the change on its new state."
    ),
    "STATE_NOT_FOUND": Reason(NotFound, "NOT_FOUND", "Check the scope and the key, or write the blob with PutState."),
    "STATE_VERSION_MISMATCH": Reason(
        Conflict, "ABORTED", "Read the blob again and repeat the change on its new version, with a new write_id."
    ),
    "WRITE_ID_REUSED": Reason(
        Conflict, "ALREADY_EXISTS", "Mint a new write_id for new content; send a retry with the same content."
    ),
    "STATE_FULL": Reason(
        Exhausted, "RESOURCE_EXHAUSTED", "Delete blobs that have no more use, or keep large content elsewhere."
    ),
    "SESSION_ARCHIVED": Reason(
        Denied, "FAILED_PRECONDITION", "The session expired and is read-only; go on in a new one."
    ),
    "NOT_OWNER": Reason(
        Unavailable, "UNAVAILABLE", "Send the call to the owning node, or wait until it releases the session.", 1000
    ),
    "OWNER_UNREACHABLE": Reason(
        Unavailable,
        "UNAVAILABLE",
        "Try again: another node takes the session over once its owner's lease has stood still for three lease times.",
        500,
    ),
    "NODE_UNVERIFIED": Reason(
        Denied, "PERMISSION_DENIED", "Only nodes of this bucket may call this, each with the node_key that they share."
    ),
    "EPOCH_LOST": Reason(Conflict, "ABORTED", "Another node wrote this session first; send the call again."),
    "EPOCH_FENCED": Reason(Unavailable, "UNAVAILABLE", "Another node took the session over; send the call again.", 200),
    "PINS_FULL": Reason(
        Exhausted, "RESOURCE_EXHAUSTED", "Unpin a fact first, or raise the policy's pins_budget_tokens."
    ),
    "TOO_MANY_FORKS": Reason(
        Exhausted, "RESOURCE_EXHAUSTED", "Delete forks that are not needed any more, or fork one of the forks."
    ),
    # durability
    "CLOUD_NOT_COMMITTED": Reason(
        Unavailable,
        "UNAVAILABLE",
        "The turn is safe on the node's disk only. Send the same turn_id again to complete it.",
        1000,
    ),
    "DELETE_NOT_COMMITTED": Reason(
        Unavailable,
        "UNAVAILABLE",
        "The node goes on with it and serves the session no more. Delete it again to learn when it is done.",
        1000,
    ),
    "LEASE_LAPSED": Reason(
        Unavailable,
        "UNAVAILABLE",
        "The node can't prove that it owns the session and is set to refuse then; send the same request again.",
        1000,
    ),
    "STORE_UNAVAILABLE": Reason(
        Unavailable, "UNAVAILABLE", "The cloud tier can't be reached; try again, and see the daemon's status.", 1000
    ),
    "COMMIT_UNKNOWN": Reason(
        Unavailable,
        "UNAVAILABLE",
        "The cloud tier did not say whether the write landed. Send the same request again; it is idempotent.",
        1000,
    ),
    "NODE_STARTING": Reason(
        Unavailable, "UNAVAILABLE", "The node is not serving yet; try again, or use another node.", 500
    ),
    "NODE_DRAINING": Reason(Unavailable, "UNAVAILABLE", "The node is draining; send the call to another node.", 1000),
    "OVERLOADED": Reason(Exhausted, "RESOURCE_EXHAUSTED", "Too many calls at once; back off and try again.", 200),
    "BATCH_REPLY_FULL": Reason(
        Exhausted,
        "RESOURCE_EXHAUSTED",
        "Ask for this one again in a call of its own, or with others that were left out.",
        1,
    ),
    "HOT_TIER_FULL": Reason(
        Exhausted, "RESOURCE_EXHAUSTED", "Raise map_size_bytes or drain the node; resumes go on meanwhile.", 5000
    ),
    "DISK_FULL": Reason(
        Exhausted, "RESOURCE_EXHAUSTED", "Free space on the node's disk; resumes go on meanwhile.", 5000
    ),
    "HOT_TIER_FAILED": Reason(
        Unavailable,
        "UNAVAILABLE",
        "The node's disk failed and the daemon stops; see to the disk, then start the daemon again.",
        5000,
    ),
    "TOO_MANY_FILES": Reason(
        Exhausted,
        "RESOURCE_EXHAUSTED",
        "Raise the limit of open files (LimitNOFILE= under systemd, ulimit -n elsewhere).",
        1000,
    ),
    "DEADLINE_TOO_SHORT": Reason(Unavailable, "DEADLINE_EXCEEDED", "Allow the call more time."),
    # what was read back
    "CORRUPT_FRAME": Reason(Corrupt, "DATA_LOSS", _MOVE_HOT_ASIDE),
    "CORRUPT_HOT_ROW": Reason(Corrupt, "DATA_LOSS", _MOVE_HOT_ASIDE),
    "HOT_TIER_TRUNCATED": Reason(
        Corrupt,
        "DATA_LOSS",
        "Restore the file, or run sessiond repair, which moves data_dir/hot aside, and start the daemon again: sessions"
        " come back from the cloud tier and say what may be missing.",
    ),
    "CORRUPT_SEGMENT": Reason(Corrupt, "DATA_LOSS", "Run sessiond verify; restore the object from a backup."),
    "CORRUPT_MANIFEST": Reason(Corrupt, "DATA_LOSS", "Run sessiond verify; restore the object from a backup."),
    "MISSING_SEGMENT": Reason(Corrupt, "DATA_LOSS", "Run sessiond verify; restore the object from a backup."),
    "CORRUPT_BLOB": Reason(
        Corrupt, "DATA_LOSS", "Restore the object from an older version or a backup, or write the blob again."
    ),
    "MISSING_BLOB": Reason(
        Corrupt, "DATA_LOSS", "Restore the object from an older version or a backup, or write the blob again."
    ),
    "HISTORY_DIVERGED": Reason(
        Corrupt, "DATA_LOSS", "The cloud tier is ahead of this node at its own epoch; run sessiond verify."
    ),
    "NEWER_FORMAT": Reason(
        Corrupt, "FAILED_PRECONDITION", "Written by a newer release of sessiond; upgrade this one before reading it."
    ),
    "INTERNAL": Reason(Corrupt, "INTERNAL", "This is a defect of sessiond; report it with the daemon's log."),
    # starting, configuration, command line
    "UNKNOWN_CONFIG_KEY": Reason(Invalid, "INVALID_ARGUMENT", "Remove the key or correct its spelling."),
    "INVALID_CONFIG": Reason(Invalid, "INVALID_ARGUMENT", "Correct the named setting."),
    "UNWRITABLE_FOLDER": Reason(
        Denied, "PERMISSION_DENIED", "Give the daemon's user write permission, or choose another folder."
    ),
    "NETWORK_FILESYSTEM": Reason(
        Invalid, "INVALID_ARGUMENT", "Use a local disk: locks and fsync of network filesystems can't be trusted."
    ),
    "PORT_IN_USE": Reason(Unavailable, "UNAVAILABLE", "Stop the other process, or listen on another port."),
    "NODE_NAME_IN_USE": Reason(
        Unavailable, "UNAVAILABLE", "Another daemon is running under this node name; give this one another --node-name."
    ),
    "DAMAGED_VOCABULARY": Reason(Corrupt, "DATA_LOSS", "Install the sessiond package again."),
    "HOT_TIER_IN_USE": Reason(
        Unavailable, "UNAVAILABLE", "Stop the daemon, or whatever reads this hot tier, and run the command again."
    ),
    "UNFLUSHED_TURNS": Reason(
        Denied,
        "FAILED_PRECONDITION",
        "Start the daemon on this hot tier so that it flushes them, or run sessiond repair; to go on without these"
        " turns, pass --abandon-unflushed.",
    ),
    "WRONG_HASH_KEY": Reason(
        Invalid, "FAILED_PRECONDITION", "Use the hash key that this bucket was made with, or another bucket or prefix."
    ),
    "WRONG_STORE": Reason(
        Invalid,
        "FAILED_PRECONDITION",
        "This hot tier belongs to another bucket; use its own --cloud, or another --data-dir.",
    ),
    "STORE_UNFIT": Reason(
        Invalid, "FAILED_PRECONDITION", "Use a store that keeps conditional writes: exactly one winner per If-Match."
    ),
    "STORE_DENIED": Reason(
        Denied,
        "PERMISSION_DENIED",
        "Check the credentials and the bucket's policy: get, put, delete and list are needed.",
    ),
    "BUCKET_NOT_FOUND": Reason(NotFound, "NOT_FOUND", "Make the bucket, or correct --cloud and --s3-endpoint."),
    "INVALID_INPUT_FILE": Reason(Invalid, "INVALID_ARGUMENT", "Correct the named line of the file."),
    "SERVER_UNREACHABLE": Reason(
        Unavailable,
        "UNAVAILABLE",
        "Start the daemon with sessiond serve, or name it with --server or SESSIOND_SERVER.",
        1000,
    ),
    "VIOLATIONS_FOUND": Reason(Corrupt, "DATA_LOSS", "Read the explanation of each violation."),
}
