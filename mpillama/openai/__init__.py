"""Between OpenAI's JSON and the engine's requests and outputs: pure functions of data, no sockets."""
