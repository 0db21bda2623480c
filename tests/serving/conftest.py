"""A server of the tiny checkpoint: in the test's own event loop, and behind a real port."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import threading
import time

import httpx
import pytest
import torch

import revox
from revox.serving.app import create_app
from revox.serving.settings import ServeSettings


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tts(tiny_checkpoint):
    # float64, where no code hangs on a rounding: what is compared here must be equal on every machine.
    loaded = revox.load(tiny_checkpoint, device="cpu", dtype=torch.float64)
    # One Euler step a frame: it is the server that is tested here, not the sound.
    acoustic = loaded.model.acoustic_transformer
    acoustic.config = dataclasses.replace(acoustic.config, n_decoding_steps=1)
    return loaded


@pytest.fixture(autouse=True)
def _own_state(tmp_path, monkeypatch):
    """Nothing is read from or left in the user's own folders."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def settings(tiny_checkpoint, tmp_path):
    def make(**changes):
        # One take: random weights have no good ones.
        values = {"voices_folder": tmp_path / "voices", "marking": False, "model_name": "tiny", "takes": 1}
        values |= changes
        return ServeSettings(checkpoint=str(tiny_checkpoint), **values)

    return make


@pytest.fixture
def serve(tts, settings):
    """`with serve(**settings) as (url, app)`: a real uvicorn on a free port, in a thread."""
    import uvicorn

    @contextlib.contextmanager
    def running(**changes):
        app = create_app(settings(**changes), tts)
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", timeout_keep_alive=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            _until(lambda: server.started, "the server starts")
            port = server.servers[0].sockets[0].getsockname()[1]
            yield f"http://127.0.0.1:{port}", app
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()

    return running


@pytest.fixture
def held():
    """`with held(engine, frames) as go:` all speech stands still after so many frames, until `go.set()`."""

    @contextlib.contextmanager
    def holding(engine, frames):
        go, step, made = threading.Event(), engine._engine.step, itertools.count()

        def waiting():
            if next(made) >= frames:
                go.wait(60)
            return step()

        engine._engine.step = waiting
        try:
            yield go
        finally:
            go.set()
            engine._engine.step = step

    return holding


@pytest.fixture
def talk(tts, settings):
    """`talk(dialogue, **settings)`: run `async def dialogue(client, app)` against an application."""

    def run(dialogue, **changes):
        async def everything():
            app = create_app(settings(**changes), tts)
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with (
                app.router.lifespan_context(app),
                httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client,
            ):
                return await asyncio.wait_for(dialogue(client, app), 60)

        return asyncio.run(everything())

    return run


@pytest.fixture
def until():
    """`until(condition, what, seconds)`: wait for a condition, but not for ever."""
    return _until


def _until(condition, what, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"within {seconds:g} s: {what}"
        time.sleep(0.005)
