"""`revox serve`: a checkpoint behind an OpenAI-compatible HTTP API."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from revox.cli.marked import model_name as name_of
from revox.cli.options import (
    Adapter,
    CheckpointArgument,
    CheckpointOption,
    Device,
    Revision,
    Weights,
    chosen_checkpoint,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable

    from fastapi import FastAPI

    from revox.serving.settings import ServeSettings


OLD_NAMES = {
    "--clone-by": "--method",
    "--dtype": "--weights",
    "--keep-pace": "--admission-control",
    "--no-keep-pace": "--no-admission-control",
}


def command(
    checkpoint: CheckpointArgument = None,
    checkpoint_option: CheckpointOption = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 is all of them, and should have API keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 picks a free one.")] = 8000,
    wyoming: Annotated[
        str | None,
        typer.Option(
            metavar="tcp://HOST:PORT",
            help="Serve Home Assistant's voice protocol as well, which has no keys; 10200 is its usual port.",
        ),
    ] = None,
    device: Device = None,
    weights: Weights = "auto",
    adapter: Adapter = None,
    model_name: Annotated[
        str | None, typer.Option(help="The model's id in the API; default: the folder's name.")
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=TARGET",
            help="Another name for a voice or for the model, as tts-1=MODEL or alloy=neutral_female; may be "
            "repeated.",
        ),
    ] = None,
    compatible: Annotated[
        bool,
        typer.Option(
            "--compatible",
            help="Ignore fields that have no effect, and name them in x-revox-ignored; they are refused "
            "otherwise. MP3 is then the default format, as OpenAI's.",
        ),
    ] = False,
    voices_folder: Annotated[
        Path | None, typer.Option(help="The folder of uploaded voices; default: in the user's data folder.")
    ] = None,
    keep_samples: Annotated[
        bool, typer.Option("--keep-samples", help="Keep the recordings of uploaded voices too.")
    ] = False,
    method: Annotated[
        str,
        typer.Option(
            metavar="auto|encoder|student|inversion",
            help="How recordings become voices; auto takes the encoder if there is one, else a student "
            "(`revox train student`), and otherwise inverts uploads and refuses ref_audio.",
        ),
    ] = "auto",
    clone_seconds: Annotated[float, typer.Option(help="The time limit of an inversion, in seconds.")] = 60.0,
    consent_statement: Annotated[
        str | None,
        typer.Option(help="The operator's consent statement for ref_audio without one; it is logged."),
    ] = None,
    allowed_folder: Annotated[
        Path | None, typer.Option(help="Allow file:// recordings below this folder; default: none.")
    ] = None,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Fetch http(s) recordings, never from private networks.")
    ] = False,
    api_keys: Annotated[
        Path | None, typer.Option(help="The file of API keys; default: no key is required.")
    ] = None,
    rate_limit: Annotated[
        int | None, typer.Option(min=1, help="Requests a minute for a key without a limit of its own.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="A web origin whose pages may call the API; may be repeated."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A host name of this server, such as tts.example.org; may be repeated."),
    ] = None,
    max_streams: Annotated[int, typer.Option(min=1, max=256, help="Concurrent utterances.")] = 8,
    admission_control: Annotated[
        bool, typer.Option(help="Run fewer at once if the machine could not keep up with playback.")
    ] = True,
    cache_mb: Annotated[
        int | None,
        typer.Option(min=1, help="Memory for concurrent utterances' keys and values; default: half of it."),
    ] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Utterances that may wait; more are a 429.")] = 64,
    max_text_characters: Annotated[int, typer.Option(min=1, help="The longest text of a request.")] = 4096,
    max_chars: Annotated[
        int, typer.Option(min=20, max=2000, help="Speak at most so many characters at a time.")
    ] = 300,
    takes: Annotated[
        int, typer.Option(min=1, max=10, help="Speak what goes wrong again, at most so many times in all.")
    ] = 3,
    text_normalization: Annotated[
        str,
        typer.Option(
            metavar="basic|full|none",
            help="Markup is read as text; with numbers spelled; as it is.",
        ),
    ] = "basic",
    lexicon: Annotated[
        Path | None, typer.Option(help="Lines of `written = spoken`, for words that are read wrongly.")
    ] = None,
    max_reference_seconds: Annotated[float, typer.Option(help="The longest recording.")] = 300.0,
    max_body_bytes: Annotated[int, typer.Option(min=1024, help="The largest body of a request.")] = 16 << 20,
    max_voices: Annotated[int, typer.Option(min=0, help="The most uploaded voices.")] = 1000,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="Time to finish active requests after SIGTERM.")
    ] = 30.0,
    marking: Annotated[bool, typer.Option(help="Mark speech as synthetic, in files and headers.")] = True,
    sign_certificate: Annotated[
        Path | None, typer.Option(help="Certificate chain (PEM) that signs marks; default: a generated one.")
    ] = None,
    sign_key: Annotated[Path | None, typer.Option(help="Its key (PEM).")] = None,
    revision: Revision = None,
) -> None:
    """Serve CHECKPOINT over HTTP, for clients of OpenAI's and vllm-omni's speech APIs.

    Only this machine can connect unless --host names another address. Ctrl-C or SIGTERM finishes the active
    requests and exits.
    """
    from revox.serving.settings import ServeSettings, settings_from

    checkpoint = chosen_checkpoint(checkpoint, checkpoint_option)
    repeated = {
        "cors_origins": tuple(cors_origin or ()),
        "allowed_hosts": tuple(allow_host or ()),
        "aliases": aliases_from(alias or ()),
    }
    options = {name: value for name, value in locals().items() if name in ServeSettings.model_fields}
    from revox.serving.errors import ServeError

    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
        import websockets  # noqa: F401
    except ImportError as error:
        raise ServeError(
            f"serving needs {error.name}, which is not installed: pip install 'revox[serve]'"
        ) from None
    from revox.serving.keys import Keys

    settings = settings_from(**options, **repeated)
    # A port in use or an invalid key file is reported before gigabytes are loaded.
    listener = _listen(settings.host, settings.port, "--port or --host")
    wyoming_listener = _listen_wyoming(settings.wyoming)
    Keys(settings.api_keys, settings.rate_limit)
    import revox
    from revox.checkpoint.locate import locate
    from revox.serving.app import create_app

    folder = locate(checkpoint, revision)
    if settings.model_name is None:
        settings = settings.model_copy(update={"model_name": name_of(checkpoint)})
    tts = revox.load(folder, device=settings.device, weights=settings.weights, adapter=settings.adapter)
    app = create_app(settings, tts, wyoming_listener)
    print(_greeting(settings, listener, tts, wyoming_listener), file=sys.stderr, flush=True)
    _run(app, settings, listener)


def aliases_from(given: Iterable[str]) -> dict[str, str]:
    """The aliases of options NAME=TARGET. Raises ServeError on one of another form, or given twice."""
    from revox.serving.errors import ServeError

    aliases: dict[str, str] = {}
    for one in given:
        name, _, target = (part.strip() for part in one.partition("="))
        if not name or not target:
            raise ServeError(f"--alias is {one!r}, expected NAME=TARGET, such as alloy=neutral_female")
        if name in aliases:
            raise ServeError(f"--alias {name} is given twice; leave one out")
        aliases[name] = target
    return aliases


def _listen_wyoming(address: str | None) -> socket.socket | None:
    from urllib.parse import urlsplit

    from revox.serving.errors import ServeError

    if address is None:
        return None
    try:
        import wyoming  # noqa: F401

        parts = urlsplit(address)
        host, port = (parts.hostname, parts.port) if parts.scheme == "tcp" else (None, None)
    except ImportError:
        raise ServeError(
            "--wyoming needs wyoming, which is not installed: pip install 'revox[wyoming]'"
        ) from None
    except ValueError:
        host, port = None, None
    if host is None or port is None:
        raise ServeError(f"--wyoming is {address!r}: expected an address such as tcp://127.0.0.1:10200")
    return _listen(host, port, "--wyoming")


def _listen(host: str, port: int, option: str) -> socket.socket:
    import socket

    from revox.serving.errors import ServeError

    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError: an invalid host name
        why = getattr(error, "strerror", None) or error
        raise ServeError(f"cannot listen on {host} port {port} ({why}); choose another {option}") from None
    return listener


def _greeting(
    settings: ServeSettings, listener: socket.socket, tts: Any, wyoming: socket.socket | None = None
) -> str:
    from revox.checkpoint.voices import list_voices

    host, port = listener.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    url = f"http://{name}:{port}"
    lines = [
        f"revox serves {settings.served_name!r} with {len(tts.voices())} voices on {tts.model.device.type}, "
        f"weights {tts.weights}",
        f"API      {url}/v1    (any api_key will do)" if settings.api_keys is None else f"API      {url}/v1",
        f"Page     {url}/",
        f"Docs     {url}/docs",
    ]
    if wyoming is not None:
        where, number = wyoming.getsockname()[:2]
        lines.append(f"Wyoming  tcp://{where}:{number}")
        if settings.api_keys is not None:
            lines.append("Wyoming has no keys: whoever reaches that address can speak.")
    unusable = [entry for entry in list_voices(tts.folder) if entry.problem]
    lines += [f"The voice {entry.name} cannot be used: {entry.problem}" for entry in unusable[:3]]
    if len(unusable) > 3:
        lines.append(f"So it is with {len(unusable) - 3} more; `revox voice list` names all.")
    if settings.api_keys is None and host not in ("127.0.0.1", "::1"):
        lines.append("Anyone who reaches this address can speak and clone; --api-keys FILE restricts it.")
    if not settings.marking:
        lines.append("Marking is off: speech is not marked as synthetic.")
    return "\n".join(lines)


def _run(app: FastAPI, settings: ServeSettings, listener: socket.socket) -> None:
    import logging
    import signal

    import uvicorn

    class DrainingServer(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # uvicorn closes WebSockets at once: what they speak gets its time first, and nobody new comes.
            for server in self.servers:
                server.close()
            if not self.force_exit:
                await app.state.revox.engine.drain(settings.drain_seconds)
            await super().shutdown(sockets)

        def handle_exit(self, sig: int, frame: Any) -> None:
            # From now on /ready fails, so that load balancers send no new requests. uvicorn's own handler
            # would exit by the signal, as if the server had failed.
            app.state.revox.draining = True
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws_max_size=settings.max_body_bytes,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
    )
    listener.listen(128)
    DrainingServer(config).run(sockets=[listener])
