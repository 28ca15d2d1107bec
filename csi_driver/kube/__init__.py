"""Access to the Kubernetes API. This is the only package that imports kubernetes; it returns values of the core."""
