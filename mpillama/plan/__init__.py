"""Planning without a cluster: what a model's text would do on N ranks, what it takes, and which layout to choose."""
