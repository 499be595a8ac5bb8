"""One file for each embedder family: its prompt, image rule, positions and pooling."""
