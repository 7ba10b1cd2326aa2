"""Every log event's name, and how logs are written: one JSON object a line, to standard error. No content, ever."""

from __future__ import annotations

import logging
import sys
from typing import Final

import structlog

STARTING: Final = "starting"
STORE_AWAITED: Final = "store_awaited"
SERVING: Final = "serving"
DRAINING: Final = "draining"
DRAINED: Final = "drained"
STOPPED: Final = "stopped"
# What begins and ends while a daemon serves, each told once when it does.
CLOUD_TIER_AWAY: Final = "cloud_tier_away"
LEASE_LAPSED: Final = "lease_lapsed"
DISK_FULL: Final = "disk_full"
HOT_TIER_FULL: Final = "hot_tier_full"
FENCED: Final = "fenced"
PEER_FENCED: Final = "peer_fenced"
LEASE_LOST: Final = "lease_lost"
HOT_TIER_FAILED: Final = "hot_tier_failed"
START_REFUSED: Final = "start_refused"
# A reader that keeps pages of the hot tier from being used again.
OLD_READER: Final = "old_reader"
# What becomes of worker processes.
WORKER_SERVES: Final = "worker_serves"
WORKER_GONE: Final = "worker_gone"
WORKER_KILLED: Final = "worker_killed"
WORKER_FAILED: Final = "worker_failed"
HOT_PATH_FAILED: Final = "hot_path_failed"

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def set_up_logs(level: str) -> None:
    """Write logs of this level and above."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
