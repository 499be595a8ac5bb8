"""Language models that answer: a local checkpoint, or a server."""
