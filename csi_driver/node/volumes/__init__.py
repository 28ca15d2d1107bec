"""The published volumes of the node: their table, their files, and the removal of volumes whose pods no longer exist."""
