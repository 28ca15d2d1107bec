"""The node driver: CSI services, kubelet registration, and the volumes of the node.

It must not import kubernetes, aiohttp, pydantic or yaml: it has no permission for the API server, and its memory use
counts on every node.
"""
