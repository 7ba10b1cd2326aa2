"""Three nodes, gateways that spray calls over them, and everything that can happen to a node, by a seed.

The seed says what happens to which node and for how long; what runs at that moment is the machine's. pytest prints the
seed of a run that failed.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable

import pytest

from tests.cluster.ends import finish
from tests.cluster.history import EDGE_ACK, History, read_disk
from tests.cluster.load import Gateways, append
from tests.cluster.nodes import LEASE_MS, Cluster, Member, running_cluster, until
from tests.cluster.tcp import State
from tests.seaweed import Seaweed
from tests.wire import user

SESSIONS = [f"s{number}" for number in range(8)]
WRITERS = 6
RATE_PER_S = 120
# What happens goes on for so many leases: shorter than a steal, and longer.
LEASES = (0.3, 4.5)
# So many nodes are disturbed at the same time; the third is left to take over.
DISTURBED_MAX = 2
CALM_S = (0.2, 1.0)
DRAIN_GRACE_MS = 3000


class Chaos:
    """Things that happen to nodes, one at a time to each. gone: turn_ids that were on a lost disk only, by session."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.cluster = cluster
        self.stop = threading.Event()
        self.gone: dict[str, set[str]] = defaultdict(set)
        self.happened: Counter[str] = Counter()
        self.failures: list[str] = []
        self._free = list(cluster.members)
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed} {number}"),))
            for number in range(DISTURBED_MAX)
        ]
        self._events: list[tuple[str, int, Callable[[Member, random.Random], None]]] = [
            ("crash", 3, self._crash),
            ("freeze", 3, self._freeze),
            ("partition", 5, self._partition),
            ("slow", 1, self._slow),
            ("drain", 2, self._drain),
            ("lost disk", 1, self._lose_disk),
        ]

    def __enter__(self) -> Chaos:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, rng: random.Random) -> None:
        names, weights, does = zip(*self._events, strict=True)
        while not self.stop.wait(rng.uniform(*CALM_S)):
            with self._lock:
                member = self._free.pop(rng.randrange(len(self._free)))
            place = rng.choices(range(len(names)), weights)[0]
            try:
                does[place](member, rng)
            except BaseException as error:
                self.failures.append(f"{names[place]} of {member.name}: {error!r}")
                return
            finally:
                with self._lock:
                    self.happened[names[place]] += 1
                    self._free.append(member)

    def _pause(self, rng: random.Random) -> None:
        self.stop.wait(rng.uniform(*LEASES) * LEASE_MS / 1000)

    def _crash(self, member: Member, rng: random.Random) -> None:
        member.kill()
        self._pause(rng)
        member.start()

    def _freeze(self, member: Member, rng: random.Random) -> None:
        member.freeze()
        self._pause(rng)
        member.thaw()

    def _partition(self, member: Member, rng: random.Random) -> None:
        links = rng.choice(([member.peers], [member.store], [member.peers, member.store]))
        state = rng.choice((State.CUT, State.LOST, State.DEAF, State.HELD))
        for link in links:
            assert link is not None
            link.set(state)
        self._pause(rng)
        for link in links:
            link.set(State.OPEN)

    def _slow(self, member: Member, rng: random.Random) -> None:
        for link in (member.peers, member.store):
            assert link is not None
            link.set(State.OPEN, delay_ms=rng.randint(5, 60))
        self._pause(rng)
        for link in (member.peers, member.store):
            link.set(State.OPEN)

    def _drain(self, member: Member, rng: random.Random) -> None:
        member.terminate()  # while others are away it may not come clean: then its disk has what is left
        self._pause(rng)
        member.start()

    def _lose_disk(self, member: Member, rng: random.Random) -> None:
        member.kill()
        for session, turn_ids in read_disk(member.daemon.data_dir).items():
            self.gone[session] |= turn_ids
        member.lose_disk()
        self._pause(rng)
        member.start()


def run(seaweed: Seaweed, seed: int, seconds: float) -> None:
    print(f"seed {seed}")
    with running_cluster(seaweed, flush_interval_ms=300, drain_grace_ms=DRAIN_GRACE_MS) as cluster:
        history = History()
        for place, session in enumerate(SESSIONS):
            wire = cluster[place % len(cluster.members)].wire()
            wire.create(session)
            history.appended(session, EDGE_ACK, append(wire, session, user("first", "hello")))
        with Gateways(cluster, SESSIONS, WRITERS, seed, history, rate_per_s=RATE_PER_S) as gateways:
            ends = time.monotonic() + seconds
            with Chaos(cluster, seed) as chaos:
                until(
                    lambda: time.monotonic() > ends or gateways.failures or chaos.failures,
                    "the time is over",
                    seconds + 30,
                )
            assert not chaos.failures, chaos.failures
            cluster.heal()
            gateways.wait_for(WRITERS)
        assert not gateways.failures, gateways.failures
        print(f"{gateways.told()}; {dict(chaos.happened)}; {sum(map(len, chaos.gone.values()))} turns on lost disks")
        orphans = finish(cluster, SESSIONS, history, chaos.gone)
        print(
            f"{sum(map(len, orphans.values()))} turns are listed; epochs up to {max(a.place[0] for a in history.acks)}"
        )


@pytest.mark.parametrize("seed", [1])
def test_whatever_happens_to_the_nodes_no_promise_is_broken(seaweed: Seaweed, seed: int) -> None:
    run(seaweed, seed, 25.0)


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(1000, 1100))
def test_whatever_happens_for_longer_no_promise_is_broken(seaweed: Seaweed, seed: int) -> None:
    run(seaweed, seed, 90.0)
