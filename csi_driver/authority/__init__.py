"""The authority: proves who a pod is, decides on its names by the policy, and has an issuer sign.

It may not make private keys of pods, and believes nothing that the node or an attribute says about identity.
"""
