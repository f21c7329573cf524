"""Drafters in the formats that others publish and serve: read, and written."""
