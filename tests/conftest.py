"""Fixtures for all tests."""

import signal

from tests.seaweed import seaweed  # noqa: F401

# What a shell runs in the background has interrupts ignored, and so has everything that it starts: tests that interrupt
# a command would wait for it for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
