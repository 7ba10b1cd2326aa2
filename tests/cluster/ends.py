"""How a test of several nodes ends: everything healed, every session writable at every node, every promise kept."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence

import grpc

from sessiond.v1 import context_pb2
from tests.cluster.history import EDGE_ACK, History, read_logs, read_orphans
from tests.cluster.load import CALL_S_MAX, append, resume
from tests.cluster.nodes import PATIENCE_S, Cluster, Member, until
from tests.wire import Refusal, Wire, user

CONFIRMED = context_pb2.OWNERSHIP_CONFIRMED


def make_writable(member: Member, session: str, turn_id: str, history: History, seconds: float = PATIENCE_S) -> float:
    """Append at this node until it is acknowledged under a valid lease; how long that took, in seconds."""
    heard: list[str] = []
    turn = user(turn_id, "Is anybody there?")

    with contextlib.closing(Wire(member.address)) as wire:

        def written() -> bool:
            try:
                reply = append(wire, session, turn, timeout_s=CALL_S_MAX)
            except grpc.RpcError as error:
                heard.append(f"{error.code().name} {error.details()}")
                return False
            history.appended(session, EDGE_ACK, reply)
            return bool(reply.ownership == CONFIRMED)

        try:
            return until(written, f"{session} is writable at {member.name}", seconds)
        except AssertionError as failed:
            raise AssertionError(f"{failed}; heard {Counter(heard).most_common(5)}") from failed


def missing(member: Member, session: str, **fields: object) -> list[context_pb2.MissingRange]:
    """What a confirmed answer says is, or may be, missing; asked until there is one."""
    found: list[list[context_pb2.MissingRange]] = []
    with contextlib.closing(Wire(member.address)) as wire:

        def answered() -> bool:
            try:
                receipt = resume(wire, session, CALL_S_MAX, **fields).receipt
            except grpc.RpcError as error:
                if not Refusal(error).retry_ms:
                    raise
                return False
            if receipt.ownership == CONFIRMED:
                found.append(list(receipt.missing))
            return bool(found)

        until(answered, f"{member.name} answers for {session}")
    return found[0]


def finish(
    cluster: Cluster,
    sessions: list[str],
    history: History,
    gone: dict[str, set[str]] | None = None,
    accepted: Sequence[str] = (),
) -> dict[str, set[str]]:
    """Heal everything, then check everything; the orphans that are left.

    gone: by session, turn_ids that only a disk had which was lost. A session whose log lacks one must say so, unless
    it is one of the accepted.
    """
    gone = gone or {}
    cluster.heal()
    for number, member in enumerate(cluster):
        for session in sessions:
            make_writable(member, session, f"last-{number}", history)
    cluster.flush()
    cluster.rescue()
    logs = read_logs(cluster[0].address, sessions)
    orphans = read_orphans(cluster[1].address, sessions)
    history.check(logs, orphans, gone)
    for session, turn_ids in gone.items():
        if session in accepted:
            continue
        lacking = {ack.turn_id for ack in history.acks if ack.session == session} & turn_ids
        if lacking - {turn.turn_id for turn in logs.get(session, [])} - orphans.get(session, set()):
            assert missing(cluster[2], session), f"{session} lacks {sorted(lacking)[:3]} and does not say so"
    # A node whose sessions others took has nothing to give back that is not in the cloud tier by now.
    assert cluster.stop() == [0] * len(cluster.members)
    cluster.check_clean()
    return orphans
