"""The version, in one place; a test compares it with pyproject.toml and the changelog."""

VERSION = "0.1.0"
