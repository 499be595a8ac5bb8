"""The engine: multimodal embedders, free of LlamaIndex and Qdrant."""
