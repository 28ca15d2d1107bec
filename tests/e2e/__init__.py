"""The promises that only a real kubelet can test. ``tests/e2e/run`` starts the cluster; it runs on this very machine."""
