"""The native backend: weights packed for the CPU's vector units, kernels in C++ (`mpillama._cpu`)."""
