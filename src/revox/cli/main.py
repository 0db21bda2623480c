"""`revox`: the commands put together, and every user's mistake turned into a sentence and exit code 2."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import Any

import typer

from revox.cli.options import with_old_names

# name -> (module, attribute, is a group of commands)
COMMANDS = {
    "inspect": ("revox.cli.inspect_command", "command", False),
    "doctor": ("revox.cli.doctor_command", "command", False),
    "find": ("revox.cli.find_command", "command", False),
    "clone": ("revox.cli.clone_command", "command", False),
    "speak": ("revox.cli.speak_command", "command", False),
    "compare": ("revox.cli.compare_command", "command", False),
    "render": ("revox.cli.render_command", "command", False),
    "verify": ("revox.cli.verify_command", "command", False),
    "voice": ("revox.cli.voice_command", "app", True),
    "inject": ("revox.cli.inject_command", "command", False),
    "encoder": ("revox.cli.encoder_command", "app", True),
    "quantize": ("revox.cli.quantize_command", "command", False),
    "evaluate": ("revox.cli.evaluate_command", "command", False),
    "bench": ("revox.cli.bench_command", "command", False),
    "train": ("revox.cli.train_command", "app", True),
    "restore": ("revox.cli.restore_command", "command", False),
    "deploy": ("revox.cli.deploy_command", "app", True),
    "serve": ("revox.cli.serve_command", "command", False),
    "keys": ("revox.cli.keys_command", "app", True),
    "demo": ("revox.cli.demo_command", "command", False),
    "lab": ("revox.cli.lab_command", "app", True),
}
USER_ERRORS = (
    "bench.errors:BenchError",
    "checkpoint.errors:CheckpointError",
    "coding.errors:CodingError",
    "compare.errors:CompareError",
    "demo.errors:DemoError",
    "deploy.errors:DeployError",
    "endpoints.errors:EndpointError",
    "evaluation.errors:EvaluationError",
    "find.errors:FindError",
    "marking.errors:MarkError",
    "metrics.errors:MetricError",
    "render.errors:RenderError",
    "restore.errors:RestoreError",
    "serving.errors:ServeError",
    "speech.errors:AudioError",
    "synthesis.errors:SpeakError",
    "training.errors:TrainingError",
    "workers:WorkerError",
)


def build_app() -> typer.Typer:
    """The typer application with all commands."""
    app = typer.Typer(
        name="revox",
        help="Voice cloning for Voxtral-4B-TTS: clone a voice, speak with it, restore the codec encoder.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    app.callback()(_root)
    for name, (module, attribute, is_group) in COMMANDS.items():
        imported = importlib.import_module(module)
        found: Any = getattr(imported, attribute)
        if is_group:
            app.add_typer(found, name=name)
        else:
            app.command(name, cls=with_old_names(getattr(imported, "OLD_NAMES", {})))(found)
    return app


def _version(shown: bool) -> None:
    if shown:
        from revox import __version__

        print(f"revox {__version__}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


def user_errors() -> tuple[type[Exception], ...]:
    """The exceptions whose text is meant for the user."""
    return tuple(pkgutil.resolve_name(f"revox.{name}") for name in USER_ERRORS)


def main() -> None:
    """Run the command line; 2 is the exit code of a user's mistake, 130 of Ctrl-C."""
    run_app(build_app(), "revox")


def run_app(app: typer.Typer, name: str, errors: tuple[type[Exception], ...] = ()) -> None:
    """Run `app`; `errors`, like `user_errors`, become a sentence after `name` and exit code 2."""
    try:
        app()
    except (*user_errors(), *errors) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        # A full disk, a folder without permission: the system's own sentence says it best.
        print(
            f"{name}: {error.strerror or error}{f': {error.filename}' if error.filename else ''}",
            file=sys.stderr,
        )
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        print(
            f"{name}: the device has too little memory for this; give it smaller settings, fewer bits "
            "(--weights, --dtype) or another --device, or end what else uses it",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        sys.exit(130)


def _is_out_of_memory(error: BaseException) -> bool:
    """torch raises OutOfMemoryError on a graphics card, and a plain RuntimeError on a processor."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"OutOfMemoryError", "MemoryError"}) or "can't allocate memory" in str(error)
