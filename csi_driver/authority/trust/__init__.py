"""What pods and nodes trust: the trust bundle, federations, node acknowledgements and the authority's serving certificate."""
