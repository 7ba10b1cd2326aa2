"""What gateways, apps and devices import to keep conversations in sessiond. Depends on nothing of the daemon.

    from sessiond.client import Client, user

    with Client("127.0.0.1:7443") as client:
        session = client.create_session(user_id="ada")
        client.append(session.session_id, [user("Hello")])
        context = client.resume(session.session_id, budget_tokens=4000)
        messages = context.to_openai()

`AsyncClient` has the same calls for asyncio. Errors are the kinds below; each has a reason, and says what to do next.
"""

from __future__ import annotations

from sessiond.client.aio import AsyncClient
from sessiond.client.calls import AppendResult, Reappended, context_spec
from sessiond.client.context import Context
from sessiond.client.failures import ClientError
from sessiond.client.sync import Client
from sessiond.client.turns import (
    again,
    assistant,
    from_anthropic,
    from_openai,
    milestone,
    rewind,
    state_change,
    summary,
    system,
    tool_result,
    user,
)
from sessiond.client.watching import AsyncWatch, Watch
from sessiond.errors import (
    Conflict,
    Corrupt,
    Denied,
    Exhausted,
    Invalid,
    NotFound,
    SessiondError,
    Unavailable,
    Unimplemented,
)

__all__ = [
    "AppendResult",
    "AsyncClient",
    "AsyncWatch",
    "Client",
    "ClientError",
    "Conflict",
    "Context",
    "Corrupt",
    "Denied",
    "Exhausted",
    "Invalid",
    "NotFound",
    "Reappended",
    "SessiondError",
    "Unavailable",
    "Unimplemented",
    "Watch",
    "again",
    "assistant",
    "context_spec",
    "from_anthropic",
    "from_openai",
    "milestone",
    "rewind",
    "state_change",
    "summary",
    "system",
    "tool_result",
    "user",
]
