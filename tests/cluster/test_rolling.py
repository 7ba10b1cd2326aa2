"""Three nodes restarted one after the other under load: whoever uses our client hears of no error."""

from __future__ import annotations

import asyncio

from sessiond.client import AsyncClient
from tests.cluster.nodes import running_cluster
from tests.cluster.steady import Steady, check, roll
from tests.seaweed import Seaweed

SESSIONS = [f"s{number}" for number in range(80)]
RATE_PER_S = 200


def test_a_rolling_restart_under_load_is_heard_by_nobody(seaweed: Seaweed) -> None:
    with running_cluster(seaweed, links=False, flush_interval_ms=1000) as cluster:

        async def test() -> Steady:
            async with AsyncClient(",".join(cluster.addresses), timeout_s=20) as client:
                for session in SESSIONS:
                    await client.create_session(session)
                steady = Steady(client, SESSIONS, RATE_PER_S)
                await roll(cluster, steady)
            return steady

        steady = asyncio.run(test())
        waits = sorted(call.answered_s - call.due_s for call in steady.calls)
        print(f"{len(waits)} appends, p50 {waits[len(waits) // 2]:.3f} s, p99 {waits[len(waits) * 99 // 100]:.3f} s")
        check(cluster, steady)
        assert cluster.stop() == [0, 0, 0]
        cluster.check_clean()
