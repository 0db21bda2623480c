"""The synthesizer, installed and copied."""

import shutil
import stat

import numpy as np
import pytest
from typer.testing import CliRunner

from lab import LabError, build, data
from lab.__main__ import app
from lab.build import BuildRun, BuildSettings
from lab.data import SpeechCounts, SpeechSet, write_set
from lab.flite import copy_flite, find_flite
from lab.speakers import synthetic_speakers
from lab.synthesize import synthesize

installed = pytest.mark.skipif(
    not (shutil.which("flite") and shutil.which("ldd")), reason="flite or ldd is not installed"
)


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_copied_synthesizer_finds_the_libraries_in_its_folder_first(tmp_path, monkeypatch):
    script(tmp_path / "copied" / "flite", 'printf "%s|%s" "$LD_LIBRARY_PATH" "$*"')
    monkeypatch.setenv("LD_LIBRARY_PATH", "/before")
    monkeypatch.chdir(tmp_path)
    done = find_flite(tmp_path.joinpath("copied").relative_to(tmp_path)).run(["-t", "hello there"])
    assert done.stdout.decode() == f"{tmp_path / 'copied'}:/before|-t hello there"
    script(tmp_path / "bin" / "flite", 'printf "%s" "$LD_LIBRARY_PATH"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    assert find_flite().run([]).stdout == b"/before"


def test_what_cannot_be_run_or_is_not_there_is_named(tmp_path):
    with pytest.raises(LabError, match="holds no flite: make it with `python -m lab pack"):
        find_flite(tmp_path)
    (tmp_path / "flite").write_bytes(b"\x7fELF of another machine")
    with pytest.raises(LabError, match=r"flite cannot be run here: Permission denied"):
        find_flite(tmp_path).run([])


def test_copying_takes_every_library_but_the_systems_own(tmp_path, monkeypatch):
    script(tmp_path / "bin" / "flite", "true")
    for name in ("libvoice.so.1", "libsound.so.2"):
        (tmp_path / name).write_text(name)
    listed = [
        "linux-vdso.so.1 (0x00007ff)",
        *(f"{name} => {tmp_path / name} (0x1)" for name in ("libvoice.so.1", "libsound.so.2")),
        "libc.so.6 => /lib/libc.so.6 (0x2)",
        "libm.so.6 => /lib/libm.so.6 (0x3)",
        "/lib64/ld-linux-x86-64.so.2 (0x4)",
    ]
    script(tmp_path / "bin" / "ldd", "cat <<'END'\n" + "\n".join(f"\t{line}" for line in listed) + "\nEND")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    size = copy_flite(tmp_path / "copied")
    assert sorted(path.name for path in (tmp_path / "copied").iterdir()) == [
        "flite", "libsound.so.2", "libvoice.so.1",
    ]  # fmt: skip
    assert size == sum(path.stat().st_size for path in (tmp_path / "copied").iterdir())
    (tmp_path / "libvoice.so.1").unlink()
    with pytest.raises(LabError, match=r"library libvoice\.so\.1 is missing"):
        copy_flite(tmp_path / "again")
    (tmp_path / "bin" / "ldd").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(LabError, match="from Linux to Linux only"):
        copy_flite(tmp_path / "again")


@installed
def test_a_copied_synthesizer_gives_the_same_samples_where_none_is_installed(tmp_path, monkeypatch):
    size = copy_flite(tmp_path / "flite")
    assert size < 40e6
    here = [synthesize(speaker, "page nine of ten") for speaker in synthetic_speakers()[:2]]
    monkeypatch.setenv("PATH", "")
    for speaker, one in zip(synthetic_speakers()[:2], here, strict=True):
        there = synthesize(speaker, "page nine of ten", flite=find_flite(tmp_path / "flite"))
        assert np.array_equal(there.samples, one.samples)
        assert there.phones == one.phones


def test_nothing_is_packed_of_a_folder_without_speech(tmp_path):
    for flags in ([], ["--flite"]):
        failed = CliRunner().invoke(app, ["pack", str(tmp_path), *flags]).exception
        assert isinstance(failed, LabError)
        assert "holds no speech: make it with `python -m lab build RUN --stage speech`" in str(failed)
    assert not list(tmp_path.iterdir())


@installed
def test_a_packed_synthesizer_makes_the_same_speech_on_the_other_machine(tmp_path, monkeypatch):
    chosen = [next(s for s in synthetic_speakers() if s.split == split) for split in ("train", "heldout")]
    monkeypatch.setattr(data, "synthetic_speakers", lambda: chosen)
    here = tmp_path / "here"
    counts = SpeechCounts(per_speaker=2, per_preset=2, per_check=1)
    data.prepare(here / "data", None, counts, splits=("train",))
    human = np.round(3000 * np.sin(np.arange(24000) / 20)).astype(np.int16)
    entry = {"speaker": "h", "sex": "F", "preset": None, "text": None, "samples": len(human)}
    write_set(here / "data", "human-train", iter([(human, [entry])]))

    done = CliRunner().invoke(app, ["pack", str(here), "--flite"])
    assert done.exit_code == 0, done.output
    shards = sorted(path.name for path in (here / "shards").iterdir())
    assert shards == ["flite", "human-train"]

    (here / "shards" / "synthetic-train").mkdir()
    assert isinstance(CliRunner().invoke(app, ["pack", str(here), "--flite"]).exception, LabError)
    (here / "shards" / "synthetic-train").rmdir()

    there = tmp_path / "there"
    shutil.copytree(here / "shards", there / "shards")
    monkeypatch.setenv("PATH", "")
    run = BuildRun(there, BuildSettings(speech=counts))
    monkeypatch.setattr(build, "prepare", lambda *a, **k: data.prepare(*a, **k, splits=("train",)))
    # The human clips are those of the shards, even if other clips are given.
    build.make_speech(run, tmp_path / "others", there / "shards" / "flite")
    made, again = (SpeechSet(one / "data", "train", "synthetic") for one in (here, there))
    assert [u.text for u in made.utterances] == [u.text for u in again.utterances]
    assert len(made) == 2 * len({u.speaker for u in made.utterances}) > 0
    assert all(np.array_equal(made.waveform(i), again.waveform(i)) for i in range(len(made)))
    assert len(SpeechSet(there / "data", "train", "human")) == 1
