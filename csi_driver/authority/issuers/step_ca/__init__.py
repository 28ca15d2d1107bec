"""step-ca as an issuer.

The authority holds the key of a JWK provisioner and signs a token for each request. The token contains the names that the
policy granted and the hash of the node's CSR. It is valid for one minute and one use, so anyone who reads it between the
authority and step-ca, or in step-ca's log, can't use it.
"""
