"""The Secrets controller: keeps TLS Secrets valid for Ingresses, Gateways and lists."""
