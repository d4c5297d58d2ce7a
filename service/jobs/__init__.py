"""Fine-tune jobs and the versions of adapters that they make: what must last, and who is told."""
