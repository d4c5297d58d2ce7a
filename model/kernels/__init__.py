"""Native kernels behind the seams of `model.gemma`, and the step that builds them."""
