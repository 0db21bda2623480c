"""The probe of another service, against a server whose speed the test sets."""

from __future__ import annotations

import http.server
import threading
import time

import pytest

from revox.bench import neighbor
from revox.bench.errors import BenchError
from revox.bench.neighbor import NeighborProbe


@pytest.fixture
def service():
    """A server with `delay` seconds, `status` and `asked`; `slow_once` delays one answer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.server.asked += 1
            delay = self.server.delay
            if self.server.slow_once:
                self.server.slow_once, delay = False, 0.5
            self.server.wake.wait(delay)
            self.send_response(self.server.status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.delay, server.status, server.asked, server.slow_once = 0.002, 200, 0, False
    server.wake, server.url = threading.Event(), f"http://127.0.0.1:{server.server_port}/health"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.wake.set()
    server.shutdown()
    server.server_close()


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


def probe(service, **changes):
    one = NeighborProbe(service.url, interval=0.01, **changes)
    one.baseline()
    return one


def test_a_neighbor_that_becomes_slow_stops_the_run(service):
    one = probe(service, abort_above=0.2)
    one.watch()
    until(lambda: len(one.during) > 3)
    assert one.should_stop() is None
    service.delay = 0.4
    until(one.should_stop)
    assert "at most 200 ms were allowed" in one.stopped
    service.delay = 0.002
    one.end()
    report = one.report()
    assert report["probes"][0] == report["probes"][2] == neighbor.PROBES
    assert report["during_max"] >= 0.4


def test_one_slow_answer_does_not(service):
    one = probe(service, abort_above=0.2)
    service.slow_once = True
    one.watch()
    until(lambda: len(one.during) > 10)
    one.end()
    assert max(one.during) >= 0.2
    assert one.stopped is None


def test_the_limit_is_twice_the_median_before(service):
    one = probe(service)
    assert one.limit == pytest.approx(2 * sorted(one.before)[neighbor.PROBES // 2], rel=0.5)


@pytest.mark.parametrize(("after", "harmed"), [([0.012] * 3, False), ([0.0121] * 3, True), ([], False)])
def test_a_median_above_one_and_a_fifth_of_that_before_is_harm(after, harmed):
    one = NeighborProbe("http://a", before=[0.01] * 3, after=after)
    assert one.harmed is harmed


def test_errors_stop_the_run_unless_it_was_stopped_on_purpose(service):
    one, stopped = probe(service), probe(service, may_be_down=True)
    stopped.abort_above = 60.0
    service.status = 503
    one.watch()
    stopped.watch()
    until(one.should_stop)
    assert "does not answer" in one.stopped
    until(lambda: len(stopped.during) > 3)
    assert stopped.should_stop() is None
    service.status = 200
    for each in (one, stopped):
        each.end()
        assert len(each.after) == neighbor.PROBES


def test_a_neighbor_that_never_answered_is_a_sentence(service, monkeypatch):
    service.status = 500
    with pytest.raises(BenchError, match="is it running"):
        probe(service)
    one = NeighborProbe(service.url, before=[0.01])
    monkeypatch.setattr(neighbor, "_RETURN_SECONDS", 0.0)
    with pytest.raises(BenchError, match="does not answer any more"):
        one.end()
