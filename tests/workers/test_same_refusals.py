"""Every refusal reaches the caller as it does from one process: its status, details and trailers, byte for byte."""

from __future__ import annotations

from tests.e2e.test_bad_input import *  # noqa: F403
