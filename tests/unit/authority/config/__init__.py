"""Tests of csi_driver/authority/config."""
