"""What each call means. Speaks in sessions and turns; gets its clock, stores and tokenizer handed in; knows no gRPC."""
