"""Calls over the port with nothing but generated stubs, so that tests see what any gRPC client would."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
from google.rpc import error_details_pb2, status_pb2

from sessiond.v1 import (
    admin_pb2_grpc,
    context_pb2,
    session_pb2,
    session_pb2_grpc,
    state_pb2_grpc,
    turn_pb2,
)

OPTIONS = [
    ("grpc.max_receive_message_length", 64 * 1024**2),
    ("grpc.max_send_message_length", 64 * 1024**2),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 200),
]
HOT, CLOUD, PARTIAL = context_pb2.RUNG_HOT, context_pb2.RUNG_CLOUD, context_pb2.RUNG_PARTIAL


class Wire:
    """Stubs of one address."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address, options=OPTIONS)
        self.sessions = session_pb2_grpc.SessionServiceStub(self.channel)
        self.states = state_pb2_grpc.StateServiceStub(self.channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(self.channel)

    def close(self) -> None:
        self.channel.close()

    def create(self, session_id: str, **fields: object) -> session_pb2.CreateSessionResponse:
        return self.sessions.CreateSession(session_pb2.CreateSessionRequest(session_id=session_id, **fields))

    def append(self, session_id: str, *turns: turn_pb2.TurnInput, **fields: object) -> session_pb2.AppendTurnResponse:
        request = session_pb2.AppendTurnRequest(session_id=session_id, turns=turns, **fields)
        return self.sessions.AppendTurn(request, timeout=30)

    def resume(self, session_id: str, budget_tokens: int = 4000, spec: dict | None = None, **fields: object):
        request = session_pb2.ResumeSessionRequest(
            session_id=session_id,
            context=context_pb2.ContextSpec(budget_tokens=budget_tokens, **(spec or {})),
            **fields,
        )
        return self.sessions.ResumeSession(request, timeout=30).context

    def turns(self, session_id: str, page_size: int = 1000) -> Iterator[turn_pb2.Turn]:
        token = ""
        while True:
            page = self.sessions.ListTurns(
                session_pb2.ListTurnsRequest(session_id=session_id, page_size=page_size, page_token=token), timeout=60
            )
            yield from page.turns
            token = page.next_page_token
            if not token:
                return


def message(turn_id: str, role: int, text: str, **fields: object) -> turn_pb2.TurnInput:
    turn = turn_pb2.TurnInput(turn_id=turn_id, role=role, **fields)
    turn.message.parts.add(text=text)
    return turn


def user(turn_id: str, text: str) -> turn_pb2.TurnInput:
    return message(turn_id, turn_pb2.ROLE_USER, text)


def assistant(turn_id: str, text: str) -> turn_pb2.TurnInput:
    return message(turn_id, turn_pb2.ROLE_ASSISTANT, text)


def tool_call(turn_id: str, *calls: tuple[str, str]) -> turn_pb2.TurnInput:
    turn = turn_pb2.TurnInput(turn_id=turn_id, role=turn_pb2.ROLE_ASSISTANT)
    for call_id, name in calls:
        turn.message.parts.add(tool_call=turn_pb2.ToolCall(call_id=call_id, name=name, arguments='{"a": 1}'))
    return turn


def tool_result(turn_id: str, call_id: str, text: str = "") -> turn_pb2.TurnInput:
    turn = turn_pb2.TurnInput(turn_id=turn_id, role=turn_pb2.ROLE_TOOL)
    part = turn.message.parts.add()
    part.tool_result.call_id = call_id
    if text:
        part.tool_result.parts.add(text=text)
    return turn


class Refusal:
    """A refusal with its details unpacked; fails where there is not exactly one ErrorInfo of ours."""

    def __init__(self, error: grpc.RpcError) -> None:
        self.code = error.code()
        self.message = error.details()
        raw = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
        assert raw is not None, f"{self.code} {self.message}: no details"
        status = status_pb2.Status.FromString(raw)
        assert status.code == self.code.value[0]
        assert status.message == self.message
        infos, self.fields, self.retry_ms = [], [], 0
        for item in status.details:
            if item.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                info = error_details_pb2.ErrorInfo()
                item.Unpack(info)
                infos.append(info)
            elif item.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                bad = error_details_pb2.BadRequest()
                item.Unpack(bad)
                self.fields = [violation.field for violation in bad.field_violations]
            elif item.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                retry = error_details_pb2.RetryInfo()
                item.Unpack(retry)
                self.retry_ms = retry.retry_delay.ToMilliseconds()
        assert len(infos) == 1
        assert infos[0].domain == "sessiond"
        self.reason = infos[0].reason
        self.metadata = dict(infos[0].metadata)


def refusal(call, *arguments, **named) -> Refusal:
    """What a call is refused with; fails if it is not."""
    try:
        answer = call(*arguments, **named)
    except grpc.RpcError as error:
        return Refusal(error)
    raise AssertionError(f"the call was answered: {answer}")
