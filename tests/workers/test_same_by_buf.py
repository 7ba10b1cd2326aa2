"""A client that nobody here wrote sees no difference: reflection, health and streams go through."""

from __future__ import annotations

from tests.e2e.test_buf_curl import *  # noqa: F403
