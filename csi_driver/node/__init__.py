"""The node driver: the CSI services, its registration with the kubelet, one volume's life and the clock of all.

It may not import kubernetes, aiohttp, pydantic or yaml: it has no permission on the API server, and memory is counted per node.
"""
