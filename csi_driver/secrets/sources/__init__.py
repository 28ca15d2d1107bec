"""The objects that request Secrets: Ingresses, Gateways and lists. One faulty entry never stops another."""
