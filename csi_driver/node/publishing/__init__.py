"""What the kubelet's calls do: publish, republish, unpublish and inspect volumes, and restore them after a restart."""
