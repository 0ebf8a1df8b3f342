"""GGUF files: what the header says, checked before anything is allocated or read because of it."""
