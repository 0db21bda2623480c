"""The page in a real Chromium: hear, clone, speak, rate; by keyboard, on a phone, against hostile names."""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
import wave
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from revox.checkpoint.voices import Voice
from revox.cloning.consent import provenance, source_of
from revox.cloning.errors import CloneError
from revox.cloning.invert import InversionProgress
from revox.lab import checkpoint_folder
from revox.marking import verify_bytes
from revox.speech import read_audio

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="there is no Chromium here to open the page in (Debian: apt-get install chromium)",
)

CLIP = sorted((checkpoint_folder().parent / "examples").glob("*.flac"))[0]
CONSENT = "Ada Example, who agreed by e-mail on 2026-11-20"
PHONE = {"width": 360, "height": 740}
LIMIT = 60_000  # ms for anything that the page waits for

# What a page plays is kept as it is handed to the loudspeaker: every WebAudio buffer, in order.
LISTEN = """
window.heard = [];
const start = AudioBufferSourceNode.prototype.start;
AudioBufferSourceNode.prototype.start = function (when, ...rest) {
  const samples = Array.from(this.buffer.getChannelData(0));
  window.heard.push({ when, rate: this.buffer.sampleRate, samples });
  return start.call(this, when, ...rest);
};
"""


@pytest.fixture(scope="module")
def microphone(tmp_path_factory):
    """The clip as the WAV that Chromium's pretended microphone speaks (16 bit, mono)."""
    path = tmp_path_factory.mktemp("microphone") / "clip.wav"
    audio = read_audio(CLIP, rate=48_000, max_seconds=10.0)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(audio.rate)
        file.writeframes((audio.samples * 32767).astype("<i2").tobytes())
    return path


@pytest.fixture(scope="module")
def window(microphone):
    """One window for all tests, as a new one takes seconds. Servers differ in their port, so in storage."""
    with sync_api.sync_playwright() as playwright, tempfile.TemporaryDirectory() as home:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            env={"HOME": home, "PATH": "/usr/bin:/bin"},
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--autoplay-policy=no-user-gesture-required",
                "--use-fake-device-for-media-stream",
                "--use-fake-ui-for-media-stream",
                f"--use-file-for-fake-audio-capture={microphone}",
            ],
        )
        page = browser.new_context(accept_downloads=True).new_page()
        page.set_default_timeout(LIMIT)
        page.add_init_script(LISTEN)
        page.on("dialog", lambda dialog: dialog.accept())
        yield page
        browser.close()


class Tab:
    """The window at a server's page, with what it asked for and complained about."""

    def __init__(self, page):
        self.page = page
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.may_complain = False
        self.hosts: tuple[str, ...] = ()
        page.on("console", self._said)
        page.on("pageerror", self._failed)
        page.on("request", self._asks)

    def _said(self, message):
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _failed(self, error):
        self.complaints.append(str(error))

    def _asks(self, request):
        self.asked.append(request.url)

    def open(self, url, *others):
        """Open the page of a server; `others` may be asked too."""
        self.hosts = (re.match(r"https?://[^/]*", url)[0] + "/", *(f"{one}/" for one in others), "blob:")
        self.page.goto(url)
        return self.page

    def close(self):
        self.page.goto("about:blank")
        self.page.unroute_all()
        for name, listener in (("console", self._said), ("pageerror", self._failed), ("request", self._asks)):
            self.page.remove_listener(name, listener)

    def heard(self) -> np.ndarray:
        """Everything that was played, as one signal."""
        played = self.page.evaluate("window.heard")
        assert all(one["rate"] == 24000 for one in played)
        ends = [one["when"] + len(one["samples"]) / 24000 for one in played]
        assert all(one["when"] > end - 1e-6 for one, end in zip(played[1:], ends[:-1], strict=True)), (
            "overlap"
        )
        return np.concatenate([np.asarray(one["samples"], np.float32) for one in played] or [np.zeros(0)])

    def saved(self, button) -> tuple[str, bytes]:
        """The file that a button saves."""
        with self.page.expect_download() as download:
            button.click()
        return download.value.suggested_filename, Path(download.value.path()).read_bytes()


@pytest.fixture
def tab(window):
    """The window. Afterwards: the page complained of nothing and asked no other host."""
    window.set_viewport_size({"width": 1280, "height": 900})
    window.emulate_media(color_scheme="light")
    tab = Tab(window)
    yield tab
    tab.close()
    assert [url for url in tab.asked if not url.startswith((*tab.hosts, "about:"))] == []
    if not tab.may_complain:
        assert tab.complaints == []


class FakeCloner:
    """Makes a voice of known codes, when it is let; `by` "encoder" at once, "inversion" as a job."""

    def __init__(self, app, by):
        self.tts, self.by = app.state.revox.tts, by
        self.go = threading.Event()
        self.error = None
        self.reference = None
        app.state.revox.voices._cloner = self

    def __call__(self, reference, *, name, consent, ref_text, progress=None, should_stop=None):
        self.reference = reference
        if progress is not None:
            progress(InversionProgress("descent", 5, 10, 1.0, 1.0, 12.5))
        while not self.go.wait(0.02) and not (should_stop and should_stop()):
            pass
        if self.error:
            raise CloneError(self.error)
        generator = torch.Generator().manual_seed(7)
        sizes = torch.tensor(self.tts.model.config.codebook_rows)[:, None] - 2
        codes = (torch.rand(len(sizes), 20, generator=generator) * sizes).long()
        rows = self.tts.model.mm_audio_embeddings.voice_rows(codes).to(torch.bfloat16)
        return Voice(name, codes, rows, provenance(consent, self.by, source=source_of(reference.data)))


def api(url: str, **fields) -> bytes:
    """What the API itself speaks."""
    return httpx.post(f"{url}/v1/audio/speech", json=fields, timeout=120).raise_for_status().content


def streamed(url: str, **fields) -> np.ndarray:
    """What the page's player should play: 16-bit samples, scaled."""
    data = api(url, response_format="pcm", stream_format="audio", **fields)
    return np.frombuffer(data, "<i2").astype(np.float32) / 32768


def loudness(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples)))) if samples.size else 0.0


def no_wider(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def hear_player(page, id: str) -> float:
    """Play an <audio> to a point within; its duration."""
    return page.evaluate(
        """async (id) => {
          const audio = document.getElementById(id);
          await audio.play();
          await new Promise((resolve) => (audio.ontimeupdate = () => audio.currentTime > 0 && resolve()));
          audio.pause();
          return audio.duration;
        }""",
        id,
    )


def test_every_voice_can_be_auditioned_and_sounds_as_the_api_speaks_it(serve, tab):
    with serve() as (url, _app):
        page = tab.open(url)
        page.get_by_role("button", name="Play it_female").wait_for()
        cards = page.locator(".voice .name").evaluate_all("all => all.map(one => one.firstChild.data)")
        assert sorted(cards) == httpx.get(f"{url}/v1/audio/voices").json()["voices"]
        # By language and sex, as the names tell: the release's English presets are named for moods.
        page.locator("#language").select_option("English")
        page.locator("#sex").select_option("female")
        assert page.locator(".voice").count() == 3
        page.locator("#language").select_option("Italian")
        page.locator("#sex").select_option("All")
        page.get_by_role("textbox", name="Phrase").fill("ten")
        page.get_by_role("button", name="Play all").click()
        page.get_by_text("it_male, 2 of 2").filter(has_text="s spoken").wait_for()
        expected = [streamed(url, input="ten", voice=voice) for voice in ("it_female", "it_male")]
        np.testing.assert_array_equal(tab.heard(), np.concatenate(expected))
        assert loudness(tab.heard()) > 0.001
        # Stop ends what has not come to its end.
        page.route("**/v1/audio/speech", lambda route: None)  # never answered
        page.get_by_role("button", name="Play it_male").click()
        page.get_by_role("button", name="Stop it_male").click()
        page.get_by_text("it_male: stopped").wait_for()


def test_speech_is_played_as_it_comes_and_the_saved_file_is_marked(serve, tab):
    with serve(marking=True) as (url, _app):
        page = tab.open(f"{url}/#speak")
        page.locator("#speak-voice option").first.wait_for(state="attached")
        page.get_by_label("Text").fill("ten past nine")
        page.locator("#speak-voice").select_option("fr_male")
        page.get_by_label("Speed").fill("1.25")
        page.locator("#seed").fill("7")
        page.get_by_role("button", name="Speak", exact=True).click()
        status = page.locator("#speak-status")
        status.filter(has_text="of speech came in").wait_for()
        asked = {"input": "ten past nine", "voice": "fr_male", "seed": 7, "speed": 1.25}
        expected = streamed(url, **asked)
        np.testing.assert_array_equal(tab.heard(), expected)
        assert loudness(expected) > 0.001
        first, spoken, took = map(float, re.findall(r"([\d.]+) s\b", status.inner_text()))
        assert spoken == pytest.approx(len(expected) / 24000, abs=0.051)
        assert 0 < first <= took
        for format in ("flac", "mp3"):
            page.locator("#format").select_option(format)
            name, data = tab.saved(page.get_by_role("button", name="Download"))
            assert name == f"fr_male-7.{format}"
            audio = read_audio(data)
            assert loudness(audio.samples) > 0.001
            assert audio.seconds == pytest.approx(len(expected) / 24000, abs=0.1)
            assert verify_bytes(data).state == "marked"
        # What cannot be is the API's own sentence, and nothing is asked for what is no number.
        page.get_by_label("Speed").fill("9")
        page.get_by_role("button", name="Speak", exact=True).click()
        refused = httpx.post(f"{url}/v1/audio/speech", json={**asked, "speed": 9}).json()["error"]["message"]
        page.locator("#speak-error").filter(has_text=refused).wait_for()
        before = len(tab.asked)
        page.locator("#seed").fill("1.5")
        page.get_by_role("button", name="Speak", exact=True).click()
        page.locator("#speak-error").filter(has_text="The seed is a whole number.").wait_for()
        assert len(tab.asked) == before
        tab.complaints = [text for text in tab.complaints if "422" not in text]  # the browser's own note


def test_a_file_is_cloned_with_consent_and_shown_beside_its_result(serve, tab):
    with serve() as (url, app):
        cloner = FakeCloner(app, "inversion")
        page = tab.open(f"{url}/#clone")
        button = page.get_by_role("button", name="Clone", exact=True)
        page.locator(".voice").first.wait_for(state="attached")
        wrong = page.locator("#clone-error")
        # One thing after another is asked for, and nothing is sent before all is there.
        for missing, fill in (
            ("no recording", lambda: page.locator("#file").set_input_files(CLIP)),
            ("tick the box", lambda: page.locator("#agreed").check()),
            ("whose voice", lambda: page.locator("#consent").fill(CONSENT)),
            ("a name", lambda: page.locator("#name").fill("en_female_ada")),
        ):
            button.click()
            assert missing in wrong.inner_text()
            fill()
        assert not any(url.endswith("/v1/audio/similarity") for url in tab.asked)
        page.locator("#result-text").evaluate("field => field.value = 'ten'")
        button.click()
        page.locator(".job .hint").filter(has_text="35 %, descent, about 13 s left").wait_for()
        assert page.locator(".job progress").evaluate("bar => bar.value") == pytest.approx(0.35)
        assert "35 %" in page.locator("#clone-status[role=status]").inner_text()
        cloner.go.set()
        page.locator("#result-caption").filter(has_text="spoken in the new voice").wait_for()
        page.locator("#result-mel[aria-label]").wait_for()
        assert cloner.reference.data == CLIP.read_bytes()
        [kept] = httpx.get(f"{url}/v1/audio/voices").json()["uploaded_voices"]
        assert kept["consent"] == CONSENT
        result = api(url, input="ten", voice="en_female_ada", response_format="wav")
        assert loudness(read_audio(result).samples) > 0.001
        reference = read_audio(CLIP)
        assert hear_player(page, "reference-audio") == pytest.approx(reference.seconds, abs=0.05)
        assert hear_player(page, "result-audio") == pytest.approx(read_audio(result).seconds, abs=0.05)
        # Two pictures on one scale of time, neither of them blank.
        pictures = page.locator(".picture canvas").evaluate_all(
            """all => all.map(one => {
                 const {data, width} = one.getContext('2d').getImageData(0, 0, one.width, one.height);
                 return [width, new Set(data.filter((_, i) => i % 4 === 0)).size];
               })"""
        )
        span = min(30.0, max(reference.seconds, read_audio(result).seconds))
        for width, shades in pictures:
            assert width == pytest.approx(span * 100, abs=2)
            assert shades > 50
        # The audition has the new voice, by the language and the sex in its name.
        page.get_by_role("link", name="Voices").click()
        page.locator("#kind").select_option("cloned")
        assert "English, female" in page.locator(".voice").inner_text()
        assert CONSENT in page.locator(".voice").inner_text()
        page.get_by_role("button", name="Delete en_female_ada").click()
        page.get_by_text("en_female_ada is deleted.").wait_for()
        assert httpx.get(f"{url}/v1/audio/voices").json()["uploaded_voices"] == []
