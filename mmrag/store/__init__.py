"""Nodes and vectors <-> Qdrant: one collection, embedded or on a server."""
