"""From logits to a token, with llama.cpp's samplers, in its order and with its defaults.

`params` holds what the user may set, `chain` runs it, `filters` are the pure steps, and `penalties`, `dry`, `mirostat`
and `adaptive` the steps that remember earlier tokens. All of it runs on rank 0 only.

Logits stay float32, as the model gives them. Probabilities are float64: the last digit of `exp` differs between
machines, and in float64 that is too small to change a draw, so that the same logits and seed give the same token.
"""
