"""Fixtures for all tests."""

from tests.seaweed import seaweed  # noqa: F401
