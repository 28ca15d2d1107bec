"""step-ca as an issuer: a JWK provisioner's key stays in the authority, which mints a token for each single request.

The token names what policy has granted and the hash of the node's request, is good for a minute and for one use. So what
stands between authority and step-ca, or in step-ca's log, can be used for nothing.
"""
