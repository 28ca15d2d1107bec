"""Tests of csi_driver.telemetry."""
