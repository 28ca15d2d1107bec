"""The authority: authenticates pods, decides by the policy which names they get, and has an issuer sign.

It creates no private keys of pods, and trusts no statement of a node or an attribute about identity.
"""
