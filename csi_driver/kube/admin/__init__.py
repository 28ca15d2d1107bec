"""What commands read with the kubeconfig of an administrator."""
