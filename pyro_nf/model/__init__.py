"""A Pyro model as one batched log joint density."""
