"""Tests of csi_driver.node.volumes."""
