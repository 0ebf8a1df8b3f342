"""Sequences, scheduling and sampling on rank 0: plain Python and NumPy, no device and no communicator."""
