"""The only importer of the kubernetes package: Secrets, ConfigMaps, TokenReviews and the cluster's JWKS.

Kubernetes models stop here: what leaves this package are values of the core.
"""
