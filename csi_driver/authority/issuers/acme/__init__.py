"""ACME (RFC 8555): certificates of public CAs.

All state is in one store, so that every replica can continue an order that another replica started. Only :mod:`.client` calls
the CA, and only :mod:`.nameserver` calls DNS servers.
"""
