"""sessiond: durable, budgeted sessions for stateless models."""

__version__ = "0.1.0"
