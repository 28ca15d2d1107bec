"""Tests of the signer of PodCertificateRequests."""
