"""The unit is one that systemd accepts, leaves the daemon time to drain, and gives it little else."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from sessiond.config import Settings

UNIT = Path(__file__).parents[2] / "systemd" / "sessiond.service"

# Every key that the unit may use, by section: systemd.unit(5), .service(5), .exec(5), .kill(5), .resource-control(5).
# systemd itself only warns of an unknown one and goes on without it.
KNOWN = {
    "Unit": "After Description Documentation StartLimitBurst StartLimitIntervalSec Wants",
    "Service": """
        AmbientCapabilities CapabilityBoundingSet DevicePolicy DynamicUser Environment EnvironmentFile ExecStart
        KillMode KillSignal LimitNOFILE LockPersonality MemoryDenyWriteExecute NoNewPrivileges NotifyAccess
        PrivateDevices PrivateIPC PrivateMounts PrivateTmp PrivateUsers ProtectClock ProtectControlGroups
        ProtectHome ProtectHostname ProtectKernelLogs ProtectKernelModules ProtectKernelTunables ProtectProc
        ProtectSystem RemoveIPC Restart RestartSec RestrictAddressFamilies RestrictNamespaces RestrictRealtime
        RestrictSUIDSGID StateDirectory StateDirectoryMode SystemCallArchitectures SystemCallErrorNumber
        SystemCallFilter TimeoutStopSec Type UMask User WatchdogSec WorkingDirectory
        """,
    "Install": "WantedBy",
}


@pytest.fixture(scope="module")
def unit() -> dict[str, dict[str, list[str]]]:
    """Section -> key -> values, in order."""
    sections: dict[str, dict[str, list[str]]] = {}
    for number, line in enumerate(UNIT.read_text().splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        if header := re.fullmatch(r"\[(\w+)\]", line):
            sections[header[1]] = defaultdict(list)
            continue
        pair = re.fullmatch(r"(\w+)=(.*)", line)
        assert pair, f"line {number} is neither section, key nor comment: {line}"
        sections[list(sections)[-1]][pair[1]].append(pair[2])
    return sections


def analyze(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str] | None:
    """systemd-analyze on a copy of the unit whose command exists here; None where there is no systemd-analyze."""
    command = shutil.which("systemd-analyze")
    if command is None:
        return None
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("ExecStart=/usr/bin/sessiond ", "ExecStart=/bin/true "))
    return subprocess.run([command, *arguments, str(copy)], capture_output=True, text=True, timeout=60, check=False)


def test_every_key_is_one_that_systemd_knows(unit, tmp_path):
    assert list(unit) == ["Unit", "Service", "Install"]
    for section, keys in unit.items():
        assert set(keys) <= set(KNOWN[section].split())
    done = analyze(tmp_path, "verify", "--man=no")
    if done is not None:
        # An unknown key or value leaves the exit code at 0.
        assert (done.returncode, done.stderr) == (0, "")


def test_the_daemon_can_reach_the_network_its_own_state_and_little_else(unit, tmp_path):
    service = unit["Service"]
    assert service["CapabilityBoundingSet"] == [""]
    for key in ("NoNewPrivileges", "PrivateDevices", "PrivateTmp", "ProtectHome", "MemoryDenyWriteExecute"):
        assert service[key] == ["yes"], key
    assert service["ProtectSystem"] == ["strict"]
    done = analyze(tmp_path, "security", "--offline=true", "--threshold=15", "--no-pager")
    if done is not None:
        assert done.returncode == 0, f"exposed by more than 1.5 of 10:\n{done.stdout}{done.stderr}"


def test_sigterm_drains_and_systemd_waits_for_it(unit):
    service = unit["Service"]
    assert service["Type"] == ["exec"]
    assert service["KillSignal"] == ["SIGTERM"]
    assert service["KillMode"] == ["mixed"]
    last_flush_ms = 30_000
    assert int(service["TimeoutStopSec"][0]) * 1000 >= Settings().drain_grace_ms + last_flush_ms


def test_data_is_kept_where_systemd_makes_room_for_it(unit):
    service = unit["Service"]
    assert service["ExecStart"] == ["/usr/bin/sessiond serve --config /etc/sessiond/sessiond.toml"]
    assert service["StateDirectory"] == ["sessiond"]
    assert service["Environment"] == ["SESSIOND_DATA_DIR=/var/lib/sessiond"]
