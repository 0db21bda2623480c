from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from revox.cli.options import CheckpointArgument, CheckpointOption, Method, chosen_checkpoint, with_old_names


@pytest.fixture
def app():
    app = typer.Typer()

    @app.command(cls=with_old_names({"--by": "--method", "--quick-encoder": "--method student"}))
    def command(
        checkpoint: CheckpointArgument = None, option: CheckpointOption = None, method: Method = "auto"
    ) -> None:
        print(chosen_checkpoint(checkpoint, option), method)

    return app


def run(app, *words, env=None):
    return CliRunner().invoke(app, list(words), env={"REVOX_CHECKPOINT": "", **(env or {})})


@pytest.mark.parametrize(
    ("words", "env", "expected"),
    [
        (["one"], None, "one"),
        (["-c", "one"], None, "one"),
        (["--checkpoint", "one"], {"REVOX_CHECKPOINT": "two"}, "one"),
        ([], {"REVOX_CHECKPOINT": "two"}, "two"),
        (["one"], {"REVOX_CHECKPOINT": "two"}, "one"),
        (["one", "-c", "one"], None, "one"),
    ],
)
def test_a_checkpoint_is_an_argument_an_option_or_the_environment(app, words, env, expected):
    assert run(app, *words, env=env).output.split() == [expected, "auto"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [([], "set REVOX_CHECKPOINT"), (["one", "-c", "two"], "two checkpoints were given")],
)
def test_no_checkpoint_or_two_are_the_users_mistake(app, words, sentence):
    result = run(app, *words)
    assert result.exit_code == 2
    assert sentence in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("words", "method"),
    [(["--by", "encoder"], "encoder"), (["--by=best"], "best"), (["--quick-encoder"], "student")],
)
def test_an_old_name_works_and_says_the_new_one(app, words, method):
    result = run(app, "one", *words)
    assert result.stdout.split() == ["one", method]
    old = words[0].partition("=")[0]
    assert result.stderr.startswith(f"{old} is now --method")


def test_what_follows_a_double_dash_is_left_alone(app):
    assert run(app, "--", "--by").output.split() == ["--by", "auto"]
