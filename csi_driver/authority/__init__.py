"""The authority authenticates pods, applies the policy and calls an issuer. It never trusts a node about a pod's identity."""
