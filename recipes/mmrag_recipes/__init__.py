"""Adapt the embedder to a domain: synthesize, mine, train, evaluate, export."""
