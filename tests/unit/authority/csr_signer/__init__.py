"""The CSR signer."""
