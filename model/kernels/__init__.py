"""Native kernels: C++ behind XLA's foreign function interface, built once on the machine at hand.

`build` makes a library of `source/*.cc`, `library` loads it. Without one the same products run on
XLA's own code, the portable path. Nothing is imported here.
"""
