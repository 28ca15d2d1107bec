"""The only importer of the kubernetes package: objects, TokenReviews, the cluster's JWKS, watches of it, and Events.

Kubernetes models stop here: what leaves this package are values of the core.
"""
