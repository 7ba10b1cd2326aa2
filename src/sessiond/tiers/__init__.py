"""Where sessions are kept: hot in LMDB on the node, cloud in an object store. Never speaks gRPC."""
