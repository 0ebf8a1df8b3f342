"""mpillama: run LLMs from GGUF files as an ordinary MPI program."""

__version__ = "0.1.0"
