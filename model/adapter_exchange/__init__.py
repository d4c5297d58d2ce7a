"""Adapter files of other libraries, in and out."""
