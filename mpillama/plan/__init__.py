"""Planning without a cluster: what a model's text would do on N ranks, what it would take, and which layout to choose."""
