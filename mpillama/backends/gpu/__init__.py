"""The GPU backend: one kernel source for CUDA, HIP and, to be proven without a GPU, the CPU."""
