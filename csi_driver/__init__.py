"""certmount: a CSI node driver that gives every Kubernetes pod a TLS certificate.

Layers, imports go down only (held by import-linter)::

    cli  >  node | authority  >  host | kube | rpc | telemetry  >  core
"""

__version__ = "0.1.0"
DRIVER_NAME = "csi.certmount.dev"
POD_AUDIENCE = "certmount"
NODE_AUDIENCE = "certmount-node"
SECRETS_AUDIENCE = "certmount-secrets"
