"""A deterministic simulation of several nodes over one bucket: the daemon's own service, tiers and protocol code on
real LMDB, in one thread, with clock, network, object store and scheduling drawn from a seed. See README.md.
"""
