"""The cloud tier: one interface for object stores, one file per backend. Knows keys and bytes, never sessions."""
