"""Read configuration files in YAML, for commands and components that may use much memory."""
