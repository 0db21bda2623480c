"""The page in a real Chromium: hear, clone, speak, rate; by keyboard, on a phone, against hostile names."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import statistics
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
from revox.demo import checkpoint_folder
from revox.losses.stft import mel_spectrogram
from revox.marking import verify_bytes
from revox.progress import Progress, ignore_progress
from revox.serving.keys import add_key
from revox.speech import read_audio

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="there is no Chromium here to open the page in (Debian: apt-get install chromium)",
)

CLIP, OTHER_CLIP = sorted((checkpoint_folder().parent / "examples").glob("*.flac"))[:2]
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
        app.state.revox.voices._clone, app.state.revox.voices.method = self, by

    def __call__(self, reference, name, consent, ref_text, progress=ignore_progress, should_stop=None):
        self.reference = reference
        progress(Progress("descent", 5, 10, {"seconds_left": 12.5}))
        while not self.go.wait(0.02) and not (should_stop and should_stop()):
            pass
        if self.error:
            raise CloneError(self.error)
        generator = torch.Generator().manual_seed(7)
        sizes = torch.tensor(self.tts.model.config.codebook_rows)[:, None] - 2
        codes = (torch.rand(len(sizes), 20, generator=generator) * sizes).long()
        rows = self.tts.model.mm_audio_embeddings.voice_embedding(codes).to(torch.bfloat16)
        return Voice(name, codes, rows, provenance(consent, self.by, source=reference.source))


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
            ("Tick the box", lambda: page.locator("#agreed").check()),
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
        assert cloner.reference.source.sha256 == source_of(CLIP.read_bytes()).sha256
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


def test_what_overlaps_or_fails_on_the_way_is_not_mixed(serve, tab):
    with serve() as (url, app):
        cloner = FakeCloner(app, "inversion")
        page = tab.open(url)
        page.get_by_role("button", name="Play it_male").wait_for()
        page.route("**/v1/audio/speech", lambda route: None)  # never answered
        # The second of two auditions can be stopped, whatever the first and the filters do.
        page.get_by_role("button", name="Play it_male").click()
        page.get_by_role("button", name="Play it_female").click()
        page.get_by_text("it_female: asked").wait_for()
        page.locator("#language").select_option("Italian")
        assert page.get_by_role("button", name="Stop it_male").count() == 0
        page.get_by_role("button", name="Stop it_female").click()
        page.get_by_text("it_female: stopped").wait_for()
        page.get_by_role("link", name="Speak", exact=True).click()
        page.locator("#text").fill("ten")
        page.get_by_role("button", name="Speak", exact=True).click()
        page.get_by_role("button", name="Another take").click()
        page.wait_for_timeout(50)
        assert page.locator("#speak-stop").is_enabled()
        page.locator("#speak-stop").click()
        page.locator("#speak-status").filter(has_text="Stopped.").wait_for()
        page.unroute_all()
        # What of a broken stream is still to come is not played.
        stopped = page.evaluate(
            """async () => {
              const { speak } = await import("/page/player.js");
              let stopped = 0;
              const stop = AudioBufferSourceNode.prototype.stop;
              AudioBufferSourceNode.prototype.stop = function () { stopped += 1; return stop.call(this); };
              const fetched = window.fetch;
              window.fetch = async () => new Response(new ReadableStream({ start(stream) {
                stream.enqueue(new Uint8Array(2 * 24000 * 4));
                setTimeout(() => stream.error(new Error("broken")), 50);
              } }));
              try { await speak({}); } catch (error) { return [error.message, stopped]; }
              finally { window.fetch = fetched; }
            }"""
        )
        assert stopped == ["The stream ended early; the speech is incomplete. Try again.", 1]
        # A question that is not answered now does not end a job; another recording asks for consent again.
        page.get_by_role("link", name="Clone", exact=True).click()
        page.locator("#file").set_input_files(CLIP)
        page.locator("#agreed").check()
        page.locator("#file").set_input_files(OTHER_CLIP)
        assert not page.locator("#agreed").is_checked()
        page.locator("#agreed").check()
        page.locator("#consent").fill(CONSENT)
        page.locator("#name").fill("ada")
        page.locator("#result-text").evaluate("field => field.value = 'ten'")
        answers = iter((503,))

        def busy(route):
            status = next(answers, None)
            if status is None:
                route.continue_()
            else:
                route.fulfill(status=status, json={"error": {"message": "Busy."}})

        page.route("**/v1/audio/voice-jobs/*", busy)
        page.get_by_role("button", name="Clone", exact=True).click()
        page.locator(".job .hint").filter(has_text="Busy. Asked again in 2 s.").wait_for()
        cloner.go.set()
        page.locator("#result-mel[aria-label]").wait_for()
        assert page.locator("#consent").input_value() == ""
        # A result that fails leaves nothing of the one before.
        page.route("**/v1/audio/voices/ada/preview", lambda route: route.fulfill(status=500, json={}))
        page.locator("#as-codes").click()
        page.locator("#result-error").filter(has_text="500").wait_for()
        assert page.locator("#result-audio").evaluate("audio => audio.src") == ""
        assert not page.locator("#result-mel").is_visible()
        tab.complaints = [text for text in tab.complaints if not re.search("503|500", text)]


@pytest.mark.slow
def test_a_voice_is_cloned_from_the_microphone(serve, tab):
    with serve() as (url, app):
        cloner = FakeCloner(app, "encoder")
        cloner.go.set()
        page = tab.open(f"{url}/#clone")
        page.locator(".voice").first.wait_for(state="attached")
        page.get_by_role("button", name="Record").click()
        # The browser's stand-in for a microphone beeps once a second: 3 s of speech need some more.
        page.get_by_role("button", name=re.compile(r"Stop recording \((8|9|1\d)")).wait_for(timeout=60_000)
        page.get_by_role("button", name="Stop recording").click()
        page.get_by_text("Recorded. Listen to it").wait_for()
        page.locator("#agreed").check()
        page.locator("#consent").fill(CONSENT)
        page.locator("#name").fill("ada")
        page.locator("#result-text").evaluate("field => field.value = 'ten'")
        page.get_by_role("button", name="Clone", exact=True).click()
        page.locator("#result-mel[aria-label]").wait_for()
        recorded = cloner.reference.selection
        assert recorded.end - recorded.start > 3
        assert loudness(recorded.samples) > 0.01


def test_what_strangers_wrote_is_text_and_never_html(serve, tab):
    hostile = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>&amp;"
    with serve() as (url, app):
        cloner = FakeCloner(app, "inversion")
        cloner.error = hostile
        cloner.go.set()
        listed = httpx.get(f"{url}/v1/audio/voices").json()
        listed["voices"] += [hostile, "ada"]
        about = {"name": "ada", "consent": hostile, "speaker_description": hostile, "method": hostile}
        listed["uploaded_voices"] = [about, {**about, "name": hostile}]
        card = {"object": "list", "data": [{"id": hostile}]}
        tab.page.route(
            "**/v1/audio/voices",
            lambda route: route.fulfill(json=listed) if route.request.method == "GET" else route.continue_(),
        )
        tab.page.route("**/v1/models", lambda route: route.fulfill(json=card))
        error = {"error": {"message": hostile, "code": None}}
        tab.page.route("**/v1/audio/speech", lambda route: route.fulfill(status=400, json=error))
        page = tab.open(url)
        page.locator(".voice").first.wait_for()
        assert page.locator("#model").inner_text() == hostile
        assert page.locator(".voice").filter(has_text=hostile).count() == 2
        page.get_by_role("button", name="Play ada").click()
        page.locator("#audition-error").filter(has_text=hostile).wait_for()
        page.get_by_role("link", name="Compare").click()
        page.locator("#voice-a").select_option(hostile)
        kept = {
            "rating_a": 5,
            "rating_b": 1,
            "voice_a": hostile,
            "voice_b": "b",
            "server_a": "",
            "server_b": "",
        }
        page.evaluate(
            "kept => localStorage.setItem('revox-ratings', kept)", json.dumps([kept, "noise", None])
        )
        page.get_by_role("link", name="Clone").click()
        page.locator("#file").set_input_files(CLIP)
        page.locator("#agreed").check()
        page.locator("#consent").fill(hostile + CONSENT)
        page.locator("#name").fill("bob")
        page.get_by_role("button", name="Clone", exact=True).click()
        page.locator(".job .error").filter(has_text=hostile).wait_for()
        page.reload()
        page.locator("#tables th").filter(has_text=hostile).wait_for(state="attached")
        assert page.locator("main img, main script, main iframe").count() == 0
        assert page.evaluate("window.hacked") is None
        # The browser itself refuses HTML, should the page ever try.
        blocked = page.evaluate(
            "() => { try { document.body.innerHTML = '<b>x</b>' } catch (e) { return e.name } }"
        )
        assert blocked == "TypeError"
        tab.may_complain = True  # of the pretended 400 and the refused HTML


def test_a_blind_comparison_hides_its_order_and_counts_every_rating(serve, tab):
    with serve() as (url, _app):
        page = tab.open(f"{url}/#compare")
        page.locator("#voice-a option").first.wait_for(state="attached")
        page.locator("#voice-a").select_option("it_male")
        page.locator("#voice-b").select_option("it_male")
        page.get_by_role("button", name="Start").click()
        assert "A and B are the same" in page.locator("#setup-error").inner_text()
        page.locator("#voice-b").select_option("fr_female")
        page.locator("#phrases").fill("ten\n\nnine")
        lengths = {
            (phrase, voice): read_audio(api(url, input=phrase, voice=voice)).seconds
            for phrase in ("ten", "nine")
            for voice in ("it_male", "fr_female")
        }
        asked = []
        page.on(
            "request",
            lambda request: (
                asked.append(request.post_data_json) if request.url.endswith("/v1/audio/speech") else None
            ),
        )
        page.get_by_role("button", name="Start").click()
        given = []
        for pair in range(2):
            page.get_by_text("Listen to both, and rate each.").wait_for()
            shown = page.locator("#trial").inner_text() + page.locator("#trial").inner_html()
            assert not re.search(r"it_male|fr_female", shown)
            assert not page.locator("#results").is_visible()
            if pair == 0:
                page.locator("#next").click()
                assert "Listen to the first too." in page.locator("#trial-error").inner_text()
            first, second = (hear_player(page, f"{which}-audio") for which in ("first", "second"))
            phrase = page.locator("#trial-phrase").inner_text().strip("“”")
            order = [body["voice"] for body in asked[-2:]]
            assert first == pytest.approx(lengths[phrase, order[0]], abs=0.02)
            assert second == pytest.approx(lengths[phrase, order[1]], abs=0.02)
            ratings = (4 + pair, 2 - pair)
            page.get_by_label(f"First: {ratings[0]} of 5").check()
            if pair == 0:
                page.locator("#next").click()
                assert "Rate the second too" in page.locator("#trial-error").inner_text()
            page.get_by_label(f"Second: {ratings[1]} of 5").check()
            given.append((phrase, dict(zip(order, ratings, strict=True)), order[0]))
            page.locator("#next").click()
        page.locator("#tables tbody tr").first.wait_for()
        _, data = tab.saved(page.get_by_role("button", name="Save as CSV"))
        rows = list(csv.DictReader(io.StringIO(data.decode())))
        assert sorted(row["first"] for row in rows) == ["A", "B"]
        for row, (phrase, rated, first) in zip(rows, given, strict=True):
            assert (row["phrase"], row["voice_a"], row["voice_b"]) == (phrase, "it_male", "fr_female")
            assert (int(row["rating_a"]), int(row["rating_b"])) == (rated["it_male"], rated["fr_female"])
            assert first == (row["voice_a"] if row["first"] == "A" else row["voice_b"])
        table = page.locator("#tables tbody tr").evaluate_all(
            "all => all.map(r => [...r.cells].map(c => c.innerText))"
        )
        for (name, n, mean, *counts), voice in zip(table, ("it_male", "fr_female"), strict=True):
            rated = [one[1][voice] for one in given]
            assert (name, n, mean) == (voice, "2", f"{statistics.mean(rated):.2f}")
            assert [int(c) for c in counts] == [rated.count(r) for r in range(1, 6)]
        page.reload()  # they are kept
        page.locator("#tables tbody tr").first.wait_for()
        # A browser that stores no more loses none, and A and B the other way about are the same pair.
        page.evaluate("void (Storage.prototype.setItem = () => { throw new Error('full'); })")
        page.locator("#voice-a").select_option("fr_female")
        page.locator("#voice-b").select_option("it_male")
        page.locator("#phrases").fill("ten\nnine")
        page.get_by_role("button", name="Start").click()
        for _ in range(2):
            page.get_by_text("Listen to both, and rate each.").wait_for()
            for which in ("first", "second"):
                hear_player(page, f"{which}-audio")
                page.get_by_label(f"{which.title()}: 3 of 5").check()
            page.locator("#next").click()
        page.locator("#results").wait_for()
        assert "does not store" in page.locator("#compare-problem").inner_text()
        assert page.locator("#tables tbody tr td:first-of-type").all_inner_texts() == ["4", "4"]
        page.reload()
        page.get_by_role("button", name="Delete results").click()
        page.get_by_text("No ratings yet.").wait_for()
        assert page.evaluate("localStorage.getItem('revox-ratings')") == "[]"


@pytest.mark.slow
def test_orders_are_balanced_sums_are_right_and_no_cell_is_a_formula(serve, tab):
    with serve() as (url, _app):
        page = tab.open(url)
        plans = page.evaluate(
            """async () => {
              const { plan } = await import("/page/trials.js");
              const phrases = (n) => [...Array(n).keys()].map(String);
              return [1, 2, 3, 8].flatMap((n) => Array.from({ length: 60 }, () => plan(phrases(n), 3)));
            }"""
        )
        for trials in plans:
            firsts = [trial["first"] for trial in trials]
            assert abs(firsts.count("a") - firsts.count("b")) == len(firsts) % 2
            assert all(
                len([t for t in trials if t["phrase"] == p]) == 3 for p in {t["phrase"] for t in trials}
            )
        # Chance alone leaves all 60 on one side once in 2^59.
        assert {trials[0]["first"] for trials in plans[60:120]} == {"a", "b"}
        phrases = ['=HYPERLINK("http://a")', '@x, "quoted"\nline', "-1+2", "plain"]
        rows = [
            {
                "phrase": p,
                "voice_a": "a",
                "voice_b": "b",
                "server_a": "",
                "server_b": "http://b:1",
                "rating_a": 1 + i,
                "rating_b": 5 - i,
                "seed": -3,
                "first": "A",
                "time": "t",
            }
            for i, p in enumerate(phrases)
        ]
        text, [pair] = page.evaluate(
            """async (rows) => {
              const { csv, summary } = await import("/page/trials.js");
              return [csv(rows), summary(rows)];
            }""",
            rows,
        )
        read = list(csv.DictReader(io.StringIO(text, newline="")))
        assert [row["phrase"] for row in read] == [f"'{p}" for p in phrases[:3]] + ["plain"]
        assert {row["seed"] for row in read} == {"-3"}
        assert pair["b"]["name"] == "b at http://b:1"
        assert pair["a"]["mean"] == statistics.mean(range(1, 5))
        assert pair["better"] == {"a": 1, "b": 2, "same": 1}


@pytest.mark.slow
def test_two_servers_are_compared_when_the_second_allows_it(serve, tab, tmp_path):
    with (
        serve() as (url, _app),
        serve(cors_origins=(url,), voices_folder=tmp_path / "other") as (other, _),
    ):
        page = tab.open(f"{url}/?with={other}#compare", other)
        page.locator("#voice-b option[value=de_male]").wait_for(state="attached")
        page.locator("#voice-a").select_option("de_male")
        page.locator("#voice-b").select_option("de_male")
        page.locator("#phrases").fill("ten")
        page.get_by_role("button", name="Start").click()
        page.get_by_text("Listen to both, and rate each.").wait_for()
        assert sum(one == f"{other}/v1/audio/speech" for one in tab.asked) >= 1
        expected = read_audio(api(other, input="ten", voice="de_male")).seconds
        for which in ("first", "second"):
            assert hear_player(page, f"{which}-audio") == pytest.approx(expected, abs=0.02)


def test_a_key_is_asked_for_kept_in_the_tab_and_sent(serve, tab, tmp_path):
    keys = tmp_path / "keys.json"
    key = add_key(keys, "ada")
    with serve(api_keys=keys) as (url, _app):
        page = tab.open(url)
        field = page.get_by_label("API key", exact=True)
        field.wait_for()
        why = page.locator("#key-why")
        refused = httpx.get(f"{url}/v1/models").json()["error"]["message"]
        assert why.inner_text() == refused
        field.fill("wrong")
        field.press("Enter")
        wrong = httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer wrong"}).json()["error"][
            "message"
        ]
        why.filter(has_text=wrong).wait_for()
        field.fill(key)
        # Another server that asks meanwhile does not get what is typed for this one.
        detail = "{ detail: { server: 'http://other:1', message: 'Why.' } }"
        page.evaluate(f"document.dispatchEvent(new CustomEvent('revox:key', {detail}))")
        assert field.input_value() == key
        field.press("Enter")
        page.locator(".voice").first.wait_for()
        assert page.locator("#key-title").inner_text() == "http://other:1 requires an API key"
        assert page.evaluate("sessionStorage.getItem('revox-key http://other:1')") is None
        stored = "[sessionStorage.getItem('revox-key'), JSON.stringify(localStorage), document.cookie]"
        assert page.evaluate(stored) == [
            key, "{}", "",
        ]  # fmt: skip
        assert not any(key in asked for asked in tab.asked)
        tab.complaints = [text for text in tab.complaints if "401" not in text]


@pytest.mark.slow
def test_everything_is_reached_and_done_with_the_keyboard(serve, tab):
    with serve() as (url, _app):
        page = tab.open(url)
        page.locator(".voice").first.wait_for()
        focused = """() => {
          const one = document.activeElement;
          const style = getComputedStyle(one);
          const label = one.labels?.[0]?.innerText ?? one.getAttribute("aria-label") ?? one.innerText;
          const box = one.getBoundingClientRect();
          return { name: label.trim().split("\\n")[0], tag: one.tagName,
            outlined: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
            seen: box.right > 0 && box.bottom > 0 && box.top < innerHeight && box.width > 0 };
        }"""

        def tab_to(name, limit=40):
            passed = []
            for _ in range(limit):
                page.keyboard.press("Tab")
                at = page.evaluate(focused)
                assert at["name"], at
                assert at["outlined"], at
                assert at["seen"], at
                passed.append(at["name"])
                if at["name"] == name:
                    return passed
            raise AssertionError(f"{name!r} is not reached: {passed}")

        assert tab_to("Play ar_male") == [
            "Skip to the content", "Voices", "Clone", "Speak", "Compare",
            "Phrase", "Language", "Sex", "Kind", "Play all", "Play ar_male",
        ]  # fmt: skip
        page.route("**/v1/audio/speech", lambda route: None)  # never answered
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Stop ar_male").wait_for()
        page.keyboard.press("Enter")  # the same button, which stops now
        page.get_by_text("ar_male: stopped").wait_for()
        page.unroute("**/v1/audio/speech")
        tab_to("Speak with ar_male")
        page.keyboard.press("Enter")
        page.locator("#speak").wait_for()
        assert page.evaluate("document.activeElement.id") == "speak-title"
        assert page.locator("#speak-voice").input_value() == "ar_male"
        tab_to("Text")
        page.keyboard.press("Control+A")
        page.keyboard.type("ten")
        tab_to("Speak")
        page.keyboard.press("Enter")
        page.locator("#speak-status").filter(has_text="of speech came in").wait_for()
        assert loudness(tab.heard()) > 0.001
        for part in ("clone", "compare"):
            page.goto(f"{url}/#{part}")
            page.locator(f"#{part}").wait_for()
            assert page.evaluate("document.activeElement.id") == f"{part}-title"
            reached = tab_to("Clone" if part == "clone" else "Start")
            assert ("Record" if part == "clone" else "Repetitions") in reached
        assert page.locator("[role=status]").count() >= 5
        named = page.locator("input, select, textarea").evaluate_all(
            "all => all.filter(one => !one.labels?.length).map(one => one.id)"
        )
        assert named == []


def test_a_phone_shows_all_of_it_without_scrolling_sideways(serve, tab):
    long = "a" * 64
    with serve() as (url, _app):
        listed = httpx.get(f"{url}/v1/audio/voices").json()
        listed["voices"].append(long)
        listed["uploaded_voices"] = [{"name": long, "consent": "x" * 300}]
        tab.page.route("**/v1/audio/voices", lambda route: route.fulfill(json=listed))
        tab.page.set_viewport_size(PHONE)
        page = tab.open(url)
        page.locator(".voice").first.wait_for()
        colours = []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(set(colours)) == 2
        kept = {"rating_a": 5, "rating_b": 1, "voice_a": long, "voice_b": "b", "server_a": "", "server_b": ""}
        page.evaluate("kept => localStorage.setItem('revox-ratings', kept)", json.dumps([kept]))
        page.reload()
        page.locator(".voice").first.wait_for()
        for part in ("Voices", "Clone", "Speak", "Compare"):
            page.get_by_role("link", name=part).click()
            page.evaluate(
                "document.querySelectorAll('main [hidden]:not(section)').forEach(one => one.hidden = false)"
            )
            page.evaluate("document.querySelectorAll('details').forEach(one => (one.open = true))")
            page.locator("#result").evaluate("one => (one.hidden = false)")
            assert no_wider(page), part
            outside = page.locator("main *").evaluate_all(
                """all => all.filter(one => !one.closest('.scroll'))
                     .filter(one => one.getBoundingClientRect().right > innerWidth + 1)
                     .map(one => one.outerHTML.slice(0, 80))"""
            )
            assert outside == [], part


@pytest.mark.slow
def test_pictures_are_the_mel_spectrograms_that_revox_measures_with(serve, tab):
    samples = 0.3 * np.random.default_rng(0).standard_normal(3000).astype(np.float32)
    with serve() as (url, _app):
        page = tab.open(url)
        found = page.evaluate(
            """async (samples) => {
              const { melSpectrogram } = await import("/page/sound.js");
              return melSpectrogram(Float32Array.from(samples));
            }""",
            samples.tolist(),
        )
    expected = mel_spectrogram(torch.from_numpy(samples), 24000, 1024, 240, 96)
    np.testing.assert_allclose(np.asarray(found).T, expected.numpy(), rtol=1e-3, atol=1e-5)
