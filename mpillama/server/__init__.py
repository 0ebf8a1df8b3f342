"""The HTTP server: sockets on one thread of rank 0, the engine on its main thread."""
