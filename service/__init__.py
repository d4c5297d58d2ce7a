"""The HTTP service: an API process without JAX, and a worker process that owns the accelerator."""
