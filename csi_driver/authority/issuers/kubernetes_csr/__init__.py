"""Any signer of the cluster as an issuer, by the API certificates.k8s.io/v1: cert-manager's, a cloud's, or one of your own.

The authority makes a CertificateSigningRequest of the node's request, has it approved or approves it, waits for the signer,
looks at what came, and removes the request. Its labels say which certificate it is for; nothing is believed because of them.
"""
