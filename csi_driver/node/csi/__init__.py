"""The gRPC services that the kubelet calls: CSI and plugin registration."""
