"""gRPC code that the node driver and the authority share."""
