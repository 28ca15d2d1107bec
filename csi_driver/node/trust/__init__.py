"""The root sets that the authority streams to the node: stored in memory, written to the volumes, acknowledged."""
