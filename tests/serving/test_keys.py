"""Keys: who is let in, how often, and what is kept of them."""

from __future__ import annotations

import hashlib
import json
import sys
import threading

import pytest

from revox.cli import main as cli
from revox.serving.errors import ApiError, ServeError
from revox.serving.keys import Keys, add_key, read_keys, remove_key


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.json"


def bearer(key: str) -> str:
    return f"Bearer {key}"


def refused(keys: Keys, authorization: str | None) -> ApiError:
    with pytest.raises(ApiError) as error:
        keys.admit(authorization)
    return error.value


def test_each_of_several_keys_is_admitted_under_its_name(path):
    secrets = {name: add_key(path, name) for name in ("ada", "bob", "web.page@home")}
    assert len(set(secrets.values())) == 3
    keys = Keys(path)
    for name, secret in secrets.items():
        assert keys.admit(bearer(secret)) == name
        assert keys.admit(f"bearer   {secret} ") == name


def test_the_file_keeps_hashes_only_and_is_the_owners(path):
    secret = add_key(path, "ada", rate_limit=5)
    [kept] = json.loads(path.read_text())["keys"]
    assert kept["sha256"] == hashlib.sha256(secret.encode()).hexdigest()
    assert secret not in path.read_text()
    assert secret.removeprefix("rvx-") not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(secret) >= 43  # 256 bits in base64


def test_a_path_without_a_name_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (".", "/", "..", str(tmp_path)):
        with pytest.raises(ServeError, match="is a folder"):
            add_key(path, "ada")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Basic {key}", "{key}", "Bearer {key}x", "Bearer x{key}", "Bearer {KEY}",
     "Bearer {hash}", "Bearer " + "a" * 10_000, "Bearer \ud800", "Bearer {key} {key}", "Bearer \x00"],
)  # fmt: skip
def test_anything_else_is_a_401_in_openais_shape(path, header):
    secret = add_key(path, "ada")
    given = header and header.replace("{key}", secret).replace("{KEY}", secret.swapcase())
    given = given and given.replace("{hash}", hashlib.sha256(secret.encode()).hexdigest())
    error = refused(Keys(path), given)
    assert error.status == 401
    assert error.headers["WWW-Authenticate"] == "Bearer"
    body = error.body()["error"]
    assert (body["type"], body["code"]) == ("authentication_error", "invalid_api_key")
    assert secret not in body["message"]


def test_every_key_is_compared_in_constant_time_whichever_fits(path, monkeypatch):
    secrets = [add_key(path, name) for name in ("a", "b", "c")]
    keys = Keys(path)
    compared = []

    def compare(kept: str, given: str) -> bool:
        compared.append(kept)
        return kept == given

    monkeypatch.setattr("revox.serving.keys.hmac.compare_digest", compare)
    for given in (*secrets, "rvx-none"):
        compared.clear()
        if given in secrets:
            keys.admit(bearer(given))
        else:
            refused(keys, bearer(given))
        assert compared == [hashlib.sha256(secret.encode()).hexdigest() for secret in secrets]


def test_a_key_asks_a_minutes_worth_at_once_and_then_as_often_as_its_limit_says(path):
    now = [1000.0]
    ada, bob = add_key(path, "ada", rate_limit=6), add_key(path, "bob")
    keys = Keys(path, rate_limit=60, clock=lambda: now[0])
    assert [keys.admit(bearer(ada)) for _ in range(6)] == ["ada"] * 6
    error = refused(keys, bearer(ada))
    assert (error.status, error.headers["Retry-After"]) == (429, "10")  # 6 a minute: one in 10 s
    assert error.body()["error"]["code"] == "rate_limit_exceeded"
    assert keys.admit(bearer(bob)) == "bob"  # has a bucket of its own
    now[0] += 9.5
    assert refused(keys, bearer(ada)).headers["Retry-After"] == "1"
    now[0] += 0.5
    keys.admit(bearer(ada))
    assert refused(keys, bearer(ada)).status == 429
    now[0] += 3600  # no more than a minute's worth is saved up
    assert [keys.admit(bearer(ada)) for _ in range(6)] == ["ada"] * 6
    assert refused(keys, bearer(ada)).status == 429
    for _ in range(60):
        keys.admit(bearer(bob))
    assert refused(keys, bearer(bob)).headers["Retry-After"] == "1"


def test_a_refused_key_costs_others_nothing_and_wrong_keys_do_not_use_up_a_limit(path):
    ada = add_key(path, "ada", rate_limit=1)
    keys = Keys(path, clock=lambda: 0.0)
    for _ in range(5):
        assert refused(keys, bearer("rvx-wrong")).status == 401
    assert keys.admit(bearer(ada)) == "ada"


def test_many_at_once_get_no_more_than_the_limit(path):
    ada = add_key(path, "ada", rate_limit=50)
    keys = Keys(path, clock=lambda: 0.0)
    admitted, refusals = [], []

    def ask() -> None:
        for _ in range(25):
            try:
                admitted.append(keys.admit(bearer(ada)))
            except ApiError as error:
                refusals.append(error.status)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(admitted), refusals) == (50, [429] * 150)


def test_keys_come_and_go_without_a_restart(path):
    ada = add_key(path, "ada")
    keys = Keys(path)
    bob = add_key(path, "bob")
    assert keys.admit(bearer(bob)) == "bob"
    remove_key(path, "ada")
    assert refused(keys, bearer(ada)).status == 401
    assert keys.admit(bearer(bob)) == "bob"
    good = path.read_text()
    path.write_text("{")  # an editor's mistake locks nobody out
    assert keys.admit(bearer(bob)) == "bob"
    path.unlink()  # who deletes the file wants nobody in
    assert refused(keys, bearer(bob)).status == 401
    path.write_text(good)
    assert keys.admit(bearer(bob)) == "bob"


def test_a_limit_survives_a_change_of_other_keys(path):
    ada = add_key(path, "ada", rate_limit=2)
    keys = Keys(path, clock=lambda: 0.0)
    keys.admit(bearer(ada))
    keys.admit(bearer(ada))
    add_key(path, "bob")
    assert refused(keys, bearer(ada)).status == 429


def test_without_a_file_everybody_is_anonymous_and_shares_the_limit():
    keys = Keys(None, rate_limit=2, clock=lambda: 0.0)
    assert [keys.admit(None), keys.admit("Bearer whatever")] == ["anonymous", "anonymous"]
    assert refused(keys, None).status == 429
    free = Keys(None)
    assert {free.admit(None) for _ in range(1000)} == {"anonymous"}


WHOLE = {"name": "a", "sha256": "0" * 64, "created_at": "2026-01-01T00:00:00Z"}


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "[]",
        "{}",
        "\x00",
        '{"keys": [{"name": "a"}]}',
        json.dumps({"format": "other", "keys": [WHOLE]}),
        json.dumps({"keys": [WHOLE, WHOLE]}),
        json.dumps({"keys": [WHOLE | {"admin": True}]}),
        json.dumps({"keys": [WHOLE | {"name": "a/b"}]}),
    ],
)
def test_a_server_does_not_start_with_a_file_that_lets_nobody_in_or_is_none(path, content):
    if content is not None:
        path.write_text(content)
    with pytest.raises(ServeError) as error:
        Keys(path)
    assert "revox keys add" in str(error.value)
    assert "\n" not in str(error.value)


def test_two_that_add_at_once_both_stay(path):
    threads = [threading.Thread(target=add_key, args=(path, f"key{i}")) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in read_keys(path).keys} == {f"key{i}" for i in range(12)}


def command(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `revox keys ...`."""
    monkeypatch.setattr(sys, "argv", ["revox", "keys", *map(str, arguments)])
    monkeypatch.setattr(cli, "COMMANDS", {"keys": cli.COMMANDS["keys"]})
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def test_the_command_makes_lists_and_removes_keys(path, monkeypatch, capsys):
    code, out, said = command(monkeypatch, capsys, "add", "ada", "--file", path, "--rate-limit", 30)
    assert code == 0
    assert Keys(path).admit(bearer(out.strip())) == "ada"
    assert out.strip() not in said
    code, out, _ = command(monkeypatch, capsys, "list", "--file", path)
    assert out.split()[0] == "ada"
    assert "30 requests a minute" in out
    assert command(monkeypatch, capsys, "remove", "ada", "--file", path)[0] == 0
    assert read_keys(path).keys == ()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("add", "ada", "--file", "{path}"), "already has a key 'ada'"),
        (("add", "a/../b", "--file", "{path}"), "cannot name a key"),
        (("add", "anonymous", "--file", "{path}"), "cannot name a key"),
        (("add", "b", "--file", "{path}/nowhere/keys.json"), "cannot be written"),
        (("remove", "bob", "--file", "{path}"), "no key 'bob'; it has ada"),
        (("list", "--file", "{path}.none"), "cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(path, monkeypatch, capsys, arguments, sentence):
    add_key(path, "ada")
    code, _, said = command(monkeypatch, capsys, *(a.format(path=path) for a in arguments))
    assert code == 2
    assert sentence in said
    assert len(said.strip().splitlines()) == 1
