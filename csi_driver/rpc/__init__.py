"""What both ends of a gRPC call share: how a failure becomes a status and a status a failure again.

It may not know what a certificate or a volume is.
"""
