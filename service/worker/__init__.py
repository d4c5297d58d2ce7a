"""The worker process: it owns the accelerator, and nothing but the loop's thread calls JAX.

Three threads: the reader takes frames in and admits or refuses (`admission`), the loop decides
(`scheduler`) and computes, the writer sends one frame a turn.
"""
