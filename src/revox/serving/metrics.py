"""Metrics of the server, for Prometheus; each server has its own registry."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Metrics:
    """The metrics that /metrics shows."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "revox_requests", "Responses, by route and status.", ["path", "status"], registry=registry
        )
        self.speech = Counter("revox_utterances", "Utterances, by outcome.", ["outcome"], registry=registry)
        self.speech_seconds = Counter(
            "revox_speech_seconds", "Seconds of speech generated.", registry=registry
        )
        self.first_audio = Histogram(
            "revox_first_audio_seconds",
            "From an utterance's arrival to its first audio.",
            buckets=(0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30),
            registry=registry,
        )
        self.real_time_factor = Histogram(
            "revox_real_time_factor",
            "Seconds of computation for a second of speech, from an utterance's start to its end.",
            buckets=(0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 5, 10),
            registry=registry,
        )
        self.active = Gauge("revox_active_streams", "Active utterances.", registry=registry)
        self.tasks = Gauge("revox_tasks", "Tasks of the event loop.", registry=registry)
        self.queued = Gauge("revox_queue_length", "Utterances in the queue.", registry=registry)


class Counted:
    """Counts an application's responses by route (not by path, which clients can make up)."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, and count its status."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = "500"

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            route: Any = scope.get("route")
            self.metrics.requests.labels(getattr(route, "path", "other"), status).inc()
