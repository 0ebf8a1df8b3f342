"""Groups of ranks: the collectives of tensors, and the control channel of one run."""
