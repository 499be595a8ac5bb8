"""How a checkpoint becomes a running model: loading, image processing, batching, pooling."""
