"""Access to the Kubernetes API over HTTP; it returns values of the core. Only ``admin.kubeconfig`` imports kubernetes."""
