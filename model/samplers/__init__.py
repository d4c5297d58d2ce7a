"""Choosing the next token: distribution rules as pure functions, and how one is drawn."""
