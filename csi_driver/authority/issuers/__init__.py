"""Issuers behind one protocol, one module or package each.

An issuer signs what admission has decided; it may not decide on names itself.
"""
