"""A hub on loopback, and an empty home, for every test of downloads."""

import os

import pytest

from tests.fakes.loopback_hubs import LoopbackHubs


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty one, without anybody's tokens or settings."""
    for name in list(os.environ):
        if name.startswith(("HF_", "KAGGLE", "HUGGING", "XDG_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.fixture
def cache(tmp_path, home):
    return tmp_path / "cache"


@pytest.fixture
def served(home, monkeypatch):
    """Starts a hub with the files of a directory, and leads both libraries to it."""
    running = []

    def serve(model):
        server = LoopbackHubs(model).__enter__()
        running.append(server)
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
        # Of this variable only kagglehub's addresses fall under it.
        monkeypatch.setenv("http_proxy", server.address)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        return server

    yield serve
    for server in running:
        server.close()
