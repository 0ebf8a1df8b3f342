"""KV of sequences in files: saved by any number of ranks, restored by any other."""
