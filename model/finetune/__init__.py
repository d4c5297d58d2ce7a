"""Training of adapters beside serving: rows of many jobs in shared micro-batches, in slices."""
