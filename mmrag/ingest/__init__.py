"""Files -> collection."""
