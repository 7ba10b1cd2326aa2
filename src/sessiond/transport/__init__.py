"""gRPC: wire bytes to calls of the service, errors to statuses. Decides nothing about sessions."""
