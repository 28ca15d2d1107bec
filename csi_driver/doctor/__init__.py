"""Examines an installation from outside, with the kubeconfig of an administrator, and the files of a volume."""
