"""What `revox` answers with, whatever happens inside: a sentence and an exit code."""

from __future__ import annotations

import errno
import inspect
import sys

import pytest

from lab.__main__ import main as lab_main
from revox.cli import main as command_line
from revox.cli.main import main, user_errors


@pytest.fixture
def ends_with(monkeypatch, capsys):
    """Runs `revox` with a command that raises -> (exit code, standard error)."""

    def run(error: BaseException) -> tuple[int, str]:
        def command() -> None:
            raise error

        monkeypatch.setattr(command_line, "build_app", lambda: command)
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


@pytest.mark.parametrize("kind", user_errors(), ids=lambda kind: kind.__name__)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(ends_with, kind):
    assert ends_with(kind("the cause; the mend.")) == (2, "revox: the cause; the mend.\n")


def test_every_package_that_has_errors_of_its_own_is_among_the_users():
    import importlib
    import pkgutil

    import revox

    modules = [m.name for m in pkgutil.walk_packages(revox.__path__, "revox.") if m.name.endswith("errors")]
    assert len(modules) > 8
    for name in modules:
        for kind in vars(importlib.import_module(name)).values():
            if inspect.isclass(kind) and issubclass(kind, Exception) and kind.__module__ == name:
                # An ApiError is an answer of the server and never reaches the command line.
                assert issubclass(kind, user_errors()) or kind.__name__ == "ApiError", kind


def test_what_the_system_says_is_passed_on_with_the_files_name(ends_with):
    full = OSError(errno.ENOSPC, "No space left on device", "/a/file")
    assert ends_with(full) == (2, "revox: No space left on device: /a/file\n")
    assert ends_with(OSError("odd")) == (2, "revox: odd\n")


def test_ctrl_c_is_exit_code_130(ends_with):
    assert ends_with(KeyboardInterrupt()) == (130, "revox: stopped\n")


def test_a_fault_of_the_program_is_not_passed_off_as_the_users(monkeypatch):
    def command() -> None:
        raise AssertionError

    monkeypatch.setattr(command_line, "build_app", lambda: command)
    with pytest.raises(AssertionError):
        main()


@pytest.mark.parametrize(
    "library", ["fastapi", "prometheus_client", "python_multipart", "uvicorn", "websockets"]
)
def test_serving_without_its_extra_names_what_is_missing_and_what_brings_it(monkeypatch, capsys, library):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr(sys, "argv", ["revox", "serve", "no-such-checkpoint"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert f"needs {library}," in said
    assert "pip install 'revox[serve]'" in said


@pytest.mark.parametrize(
    "arguments",
    [
        ("revox", "train", "encoder", "--checkpoint", "c", "--data", "d", "--out", "o"),
        ("lab", "build", "r", "--out", "o", "--encoder", "e"),
        ("lab", "recover", "--out", "o", "--data", "d"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
@pytest.mark.parametrize("device", ["cuda:99", "cudda"])
def test_a_device_that_is_not_there_is_said_before_anything_is_done(
    monkeypatch, capsys, tmp_path, arguments, device
):
    monkeypatch.chdir(tmp_path)
    program, *arguments = arguments
    monkeypatch.setattr(sys, "argv", [program, *arguments, "--device", device])
    with pytest.raises(SystemExit) as ended:
        {"revox": main, "lab": lab_main}[program]()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert f"device '{device}' is not available" in said
    assert list(tmp_path.iterdir()) == []
