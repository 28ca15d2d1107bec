"""A Prometheus that scrapes a running certmount, and the panels of the dashboard that it answers."""
