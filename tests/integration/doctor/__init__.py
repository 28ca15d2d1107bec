"""The commands status, doctor and inspect, against a real API server and running programs."""
