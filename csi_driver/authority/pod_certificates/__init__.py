"""The signer of PodCertificateRequests, and the publication of the root sets as ClusterTrustBundles."""
