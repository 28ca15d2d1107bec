"""Values of Kubernetes objects, for packages that must not import the Kubernetes client."""
