"""The hot tier: sessions in one LMDB environment on the node, shared by every process of the node.

The only room that imports lmdb. It promises that what `Environment.run` answered is on the disk, and never talks to
the cloud tier.
"""
