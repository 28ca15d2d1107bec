"""ACME (RFC 8555): certificates of public CAs, for keys that stay on their nodes.

State lies in one store, so that any replica goes on with what another began. Nothing here knows a pod's key, and only
:mod:`.connection` talks to the CA, only :mod:`.nameserver` to DNS servers.
"""
