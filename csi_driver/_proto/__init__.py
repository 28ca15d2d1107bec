"""Generated from proto/ by scripts/generate-protos. Not edited, and not imported by the lower layers."""
