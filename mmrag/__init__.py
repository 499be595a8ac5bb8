"""Multimodal RAG for LlamaIndex."""
