"""The rules of certmount, without I/O, clocks, randomness and event loops: times and random numbers are arguments."""
