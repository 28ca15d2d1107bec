"""TLS Secrets of tenants, and the objects that request them."""
