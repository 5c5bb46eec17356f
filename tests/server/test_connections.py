"""What one connection may send, how long it may take, and that it cannot hold up others: with sockets, as they come."""

import json
import re
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import httpx
import pytest

from server import protocol
from server.config import Settings
from server.listener import DrainingServer
from server.request_stream import Backlog
from tests.server.conftest import wait_until
from tests.server.test_listener import Slow, serving

TIMEOUT = 0.3
GET = b"GET /healthz HTTP/1.1\r\nHost: a\r\n"
POST = b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
BODY = b'{"prompt": "a"}'


class Running:
    """A server, and ways to speak to it."""

    def __init__(self, server: DrainingServer, slow: Slow, url: str) -> None:
        self.server, self.slow, self.url = server, slow, url
        self._address = ("127.0.0.1", int(url.rpartition(":")[2]))

    def open(self, *sent: bytes, receive: int | None = None) -> socket.socket:
        """`receive`: bytes of the client's own buffer."""
        client = socket.socket()
        client.settimeout(60)
        if receive is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        client.connect(self._address)
        for data in sent:
            client.sendall(data)
        return client

    def talk(self, *sent: bytes) -> bytes:
        """All that comes until the server closes; what it does not want to have any more is not sent."""
        with self.open() as client:
            try:
                for data in sent:
                    client.sendall(data)
            except OSError:
                pass
            return rest(client)

    def answers(self) -> bool:
        return httpx.get(f"{self.url}/healthz", trust_env=False, timeout=60).status_code == 200


def rest(client: socket.socket) -> bytes:
    received = b""
    try:
        while data := client.recv(2**16):
            received += data
    except ConnectionResetError:
        pass
    return received


def refused(answer: bytes) -> tuple[int, str]:
    """Status and type of an error in the shape that all errors have."""
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert set(error) == {"type", "code", "message", "param", "request_id"}
    assert f"x-request-id: {error['request_id']}".encode() in head
    assert b"connection: close" in head
    assert b"content-type: application/json" in head
    return int(answer.split()[1]), error["type"]


@pytest.fixture(scope="module")
def running(settings: Settings) -> Iterator[Running]:
    """For clients that do nothing wrong, however long they are kept from it."""
    with serving(settings.model_copy(update={"max_connections": 20}), 1) as (server, slow, url):
        yield Running(server, slow, url)


@pytest.fixture(scope="module")
def hasty(settings: Settings) -> Iterator[Running]:
    """For clients that are to be cut off."""
    limits = {f"{name}_timeout_s": TIMEOUT for name in ("keepalive", "client_header", "client_body", "send")}
    with serving(settings.model_copy(update=limits), 1, send=4096) as (server, slow, url):
        yield Running(server, slow, url)


# --- what a connection may send ---

TOO_LARGE = (431, "request_header_fields_too_large")


@pytest.mark.parametrize(
    "sent",
    [
        [GET, *[b"x-y: " + b"a" * 100 + b"\r\n"] * 10_000, b"\r\n"],
        [GET + b"x: ", *[b"a" * 2**16] * 32, b"\r\n\r\n"],
        [GET, *[b"a" * 2**16] * 32, b": b\r\n\r\n"],
        [b"GET /", *[b"a" * 2**16] * 32, b" HTTP/1.1\r\nHost: a\r\n\r\n"],
        [b"\r\n" * 2**20, GET, b"\r\n"],
        [POST, b"Transfer-Encoding: chunked\r\n\r\n1;", *[b"a" * 2**16] * 32, b"\r\n"],
        [POST, b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n", *[b"x: " + b"a" * 100 + b"\r\n"] * 1000],
        [POST, b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx: ", *[b"a" * 2**16] * 32],
    ],
    ids=["headers", "a value", "a name", "a path", "nothing", "a chunk's extension", "trailers", "a trailer"],
)
def test_what_is_no_body_ends_at_64_kib(running: Running, sent: list[bytes]) -> None:
    assert refused(running.talk(*sent)) == TOO_LARGE
    assert running.answers()


def test_headers_of_64_kib_are_taken(running: Running) -> None:
    head = GET + b"Connection: close\r\nx: "
    fits = head + b"a" * (2**16 - len(head) - 200)
    assert running.talk(fits + b"\r\n\r\n").startswith(b"HTTP/1.1 200")
    assert refused(running.talk(fits + b"a" * 400 + b"\r\n\r\n")) == TOO_LARGE


def test_many_requests_on_one_connection_are_counted_one_by_one(running: Running) -> None:
    one = GET + b"x: " + b"a" * 40_000 + b"\r\n\r\n"
    last = GET + b"Connection: close\r\n\r\n"
    assert running.talk(one * 5 + last).count(b"HTTP/1.1 200") == 6


def test_a_trailer_is_no_header(running: Running) -> None:
    body = b"%x\r\n%b\r\n0\r\nx-request-id: trailer\r\n\r\n" % (len(BODY), BODY)
    answer = running.talk(POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"x-request-id: trailer" not in answer


@pytest.mark.parametrize(
    "sent",
    [
        b"this is not HTTP\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        GET + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET http://a:99999999/ HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
def test_what_is_not_http_gets_an_error_like_all_others(running: Running, sent: bytes) -> None:
    assert refused(running.talk(sent)) == (400, "bad_request")


@pytest.mark.parametrize(
    ("head", "mib", "status"),
    [
        (POST, 5, 413),
        (POST.replace(b"application/json", b"application/json\r\nContent-Encoding: gzip"), 3, 415),
        (POST.replace(b"/tokenize", b"/nothing"), 3, 404),
    ],
)
def test_who_sends_a_body_that_nobody_wants_can_read_why(running: Running, head: bytes, mib: int, status: int) -> None:
    """All of it is sent before the answer is read, as most clients do, on a connection that is to be closed."""
    size = mib * 2**20
    with running.open(head + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % size) as client:
        for _ in range(size // 2**16):
            client.sendall(b" " * 2**16)
            time.sleep(0.001)
        assert refused(rest(client))[0] == status


def test_who_sends_on_for_ever_is_cut_off(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "LINGER_S", 0.3)
    with serving(settings, 1) as (server, slow, url):
        running = Running(server, slow, url)
        began = time.monotonic()  # before the server can have answered
        with running.open(POST + b"Connection: close\r\nContent-Length: 99999999999\r\n\r\n") as client:
            with suppress(OSError):  # a reset or a broken pipe
                while time.monotonic() - began < 10:
                    client.sendall(b" " * 2**16)
            assert 0.3 <= time.monotonic() - began < 5
        assert running.answers()


@pytest.mark.parametrize(
    "next_one", [b"this is not HTTP\r\n\r\n", b"GET http://a:99999999/ HTTP/1.1\r\nHost: a\r\n\r\n"]
)
def test_an_answer_that_is_due_has_no_other_one_in_it(running: Running, next_one: bytes) -> None:
    body = json.dumps({"prompt": "a", "max_new_tokens": 30, "ignore_eos": True}).encode()
    head = POST.replace(b"/tokenize", b"/generate") + b"Content-Length: %d\r\n\r\n" % len(body)
    assert b"HTTP/1.1 400" not in running.talk(head + body + next_one)


NOWHERE = POST.replace(b"/tokenize", b"/nothing")


@pytest.mark.parametrize(
    ("server", "head", "rest_of_it"),
    [
        ("hasty", NOWHERE + b"Content-Length: 1000\r\n\r\n", [b"a"]),
        ("running", NOWHERE + b"Transfer-Encoding: chunked\r\n\r\n", [b"zz\r\n"]),
        ("running", NOWHERE + b"Transfer-Encoding: chunked\r\n\r\n", [b"1;", *[b"a" * 2**16] * 8]),
        ("running", NOWHERE + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", [b"x: " + b"a" * 2**17]),
    ],
    ids=["a body that takes too long", "a bad chunk", "a chunk's extension", "a trailer"],
)
def test_a_request_that_has_been_answered_gets_no_second_answer(
    request: pytest.FixtureRequest, server: str, head: bytes, rest_of_it: list[bytes]
) -> None:
    """Who keeps the connection, as a proxy does, would take it for the answer to the next request."""
    running = request.getfixturevalue(server)
    with running.open(head) as client:
        first = client.recv(2**16)
        assert first.startswith(b"HTTP/1.1 404")
        assert b"connection: close" not in first
        for data in rest_of_it:
            client.sendall(data)
        assert b"HTTP/1.1" not in rest(client)
    assert running.answers()


def counted(running: Running) -> dict[str, int]:
    """Requests by route and status."""
    told = httpx.get(f"{running.url}/metrics", trust_env=False, timeout=60).text
    found = re.findall(r'matsteer_http_requests_total{api_key="",route="([^"]+)",status="(\d+)"} (\S+)', told)
    return {f"{route} {status}": int(float(count)) for route, status, count in found}


@pytest.mark.parametrize(
    ("server", "sent", "route"),
    [
        ("running", b"this is not HTTP\r\n\r\n", "other 400"),
        ("running", GET + b"x: " + b"a" * 2**17, "other 431"),
        ("hasty", GET, "other 408"),
        ("hasty", POST + b"Content-Length: 1000\r\n\r\na", "/tokenize 408"),
        ("running", POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "/tokenize 400"),
    ],
    ids=["no HTTP", "a long head", "half a head", "half a body", "a bad chunk"],
)
def test_what_a_connection_answers_itself_is_counted_once(
    request: pytest.FixtureRequest, server: str, sent: bytes, route: str
) -> None:
    running = request.getfixturevalue(server)
    before = counted(running)
    assert str(refused(running.talk(sent))[0]) in route
    wait_until(lambda: counted(running).get(route, 0) > before.get(route, 0))
    after = counted(running)
    assert {one for one in after if after[one] != before.get(one, 0)} == {route, "/metrics 200"}
    assert after[route] == before.get(route, 0) + 1


# --- how long it may take ---


@pytest.mark.parametrize("sent", [b"", GET + b"\r\n"], ids=["at once", "after a request"])
def test_who_asks_for_nothing_is_closed(hasty: Running, sent: bytes) -> None:
    began = time.monotonic()
    assert hasty.talk(sent).count(b"HTTP/1.1 200") == bool(sent)
    assert time.monotonic() - began >= TIMEOUT * 0.9


@pytest.mark.parametrize(
    ("sent", "slowly"),
    [(GET, b"x: y\r\n" * 1000), (POST + b"Content-Length: 1000\r\n\r\n", b"a" * 1000)],
    ids=["headers", "body"],
)
def test_who_sends_too_slowly_is_closed(hasty: Running, sent: bytes, slowly: bytes) -> None:
    """However often something comes: it is the whole that has to be there in time."""
    with hasty.open(sent) as client:
        client.settimeout(0.02)
        received = b""
        for byte in slowly:
            try:
                client.sendall(bytes([byte]))
                if not (data := client.recv(2**16)):
                    break
                received += data
            except TimeoutError:
                continue
            except OSError:
                break
        assert refused(received) == (408, "request_timeout")


def test_who_sends_slowly_enough_is_served(running: Running) -> None:
    with running.open(POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(BODY)) as client:
        for byte in BODY:
            client.sendall(bytes([byte]))
            time.sleep(0.003)
        assert rest(client).startswith(b"HTTP/1.1 200")


def test_an_answer_may_take_longer_than_any_of_it(hasty: Running) -> None:
    body = json.dumps({"prompt": "a", "max_new_tokens": 40, "ignore_eos": True}).encode()
    head = POST.replace(b"/tokenize", b"/generate") + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    began = time.monotonic()
    assert hasty.talk(head + body).startswith(b"HTTP/1.1 200")
    assert time.monotonic() - began > 2 * TIMEOUT, "every step takes a while"


STREAM = {"prompt": ["a"] * 16, "max_new_tokens": 60, "ignore_eos": True, "logprobs": 20, "stream": True}


def test_who_does_not_read_is_cut_off_and_his_texts_end(hasty: Running) -> None:
    body = json.dumps(STREAM).encode()
    head = POST.replace(b"/tokenize", b"/generate") + b"Content-Length: %d\r\n\r\n" % len(body)
    with hasty.open(head + body, receive=4096) as client:
        state = hasty.server.server_state
        assert client.recv(16, socket.MSG_PEEK) == b"HTTP/1.1 200 OK\r"
        wait_until(lambda: not state.tasks and not state.connections)
        assert b"event: done" not in rest(client)
    assert hasty.answers()


def test_what_a_slow_reader_has_not_read_waits_in_small_pieces(running: Running) -> None:
    """The whole of it comes in the end; nothing of it is written while the client has not read what came before."""
    body = json.dumps({**STREAM, "n": 2}).encode()
    head = POST.replace(b"/tokenize", b"/generate") + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    connections = running.server.server_state.connections
    with running.open(head + body, receive=4096) as client:
        wait_until(lambda: any(one.flow.write_paused for one in connections))
        buffered = [one.transport.get_write_buffer_size() for one in list(connections)]
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
        received = rest(client)
    assert b"event: done" in received
    assert received.endswith(b"0\r\n\r\n")
    assert 0 < max(buffered) < 3 * 2**16
    assert max(int(size, 16) for size in re.findall(rb"\r\n([0-9a-f]+)\r\n", received)) <= 2**16


@pytest.mark.parametrize("most", [2**19, 2**29], ids=["bounded", "not reached"])
def test_what_nobody_reads_has_a_bound_in_memory(settings: Settings, most: int) -> None:
    """The requests that are farthest behind end with an error, and nobody else."""
    body = json.dumps({**STREAM, "prompt": ["a"] * 8, "max_new_tokens": 40, "trace": True}).encode()
    head = POST.replace(b"/tokenize", b"/generate") + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    with serving(settings, 1, send=4096) as (server, slow, url), ExitStack() as stack:
        running, service = Running(server, slow, url), server._service
        service._backlog = backlog = Backlog(most)
        stack.callback(tracemalloc.stop)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        clients = [stack.enter_context(running.open(head + body, receive=4096)) for _ in range(4)]
        wait_until(lambda: len(server.server_state.tasks) == 4 and service.engine.stats.sequences > 0)
        wait_until(lambda: not service.engine.open_sequences)
        asked = {"prompt": "a", "stream": True}
        assert httpx.post(f"{url}/generate", json=asked, trust_env=False, timeout=60).is_success
        grown = tracemalloc.get_traced_memory()[0] - before
        unread = sum(stream.unread for stream in backlog._streams)
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
        ends = [rest(client)[-1000:] for client in clients]
    assert unread < most * 9 / 8
    if most == 2**19:
        assert grown < 2**21
        assert any(b"event: error" in end and b"request_timeout" in end for end in ends)
    else:
        assert grown / 2 < unread < 2 * grown, "it is counted as what it is, about"
        assert not any(b"event: error" in end for end in ends)


# --- how many there are ---


def test_idle_connections_lock_nobody_out(running: Running) -> None:
    with ExitStack() as held:
        for sent in [b"", GET[:9], POST + b"Content-Length: 9\r\n\r\n"] * 20:
            held.enter_context(running.open(sent))
        assert running.answers()


def test_the_one_that_has_been_idle_longest_is_closed_first(settings: Settings) -> None:
    with serving(settings.model_copy(update={"max_connections": 3}), 1) as (server, slow, url):
        running = Running(server, slow, url)
        body = json.dumps({"prompt": "a", "max_new_tokens": 2}).encode()
        head = POST.replace(b"/tokenize", b"/generate") + b"Connection: close\r\nContent-Length: %d\r\n\r\n"
        others_are_done = threading.Event()
        service = server._service
        service.engine.call(lambda: others_are_done.wait(60))
        with running.open(head % len(body) + body) as busy:
            wait_until(lambda: len(server.server_state.tasks) == 1)
            with running.open() as first, running.open() as second:
                wait_until(lambda: len(server.server_state.connections) == 3)
                first.sendall(GET + b"\r\n")
                assert first.recv(2**16).startswith(b"HTTP/1.1 200")
                with running.open(GET + b"\r\n") as third:
                    assert third.recv(2**16).startswith(b"HTTP/1.1 200")
                    assert rest(second) == b"", "the first one has asked for something since"
                    first.sendall(GET + b"Connection: close\r\n\r\n")
                    assert b"HTTP/1.1 200" in rest(first)  # after the last answer's body, where that came late
            others_are_done.set()
            assert rest(busy).startswith(b"HTTP/1.1 200"), "where a request is answered nothing is closed"


def test_requests_that_are_sent_ahead_are_read_as_answers_go_out(running: Running) -> None:
    with running.open(receive=4096) as client:
        client.setblocking(False)
        sent = 0
        try:
            while sent < 2**24:
                sent += client.send(b"GET /healthz HTTP/1.1\r\n\r\n" * 10_000)
        except BlockingIOError:
            pass
        ahead = [0]

        def look() -> bool:
            ahead.extend(len(one.pipeline) for one in list(running.server.server_state.connections))
            return max(ahead) > 0

        wait_until(look)
        until = time.monotonic() + 0.2
        while time.monotonic() < until:
            look()
            time.sleep(0.002)
    assert max(ahead) < 100
    assert running.answers()


def test_each_of_many_requests_that_are_sent_ahead_is_answered(running: Running) -> None:
    requests = [GET + b"\r\n", POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY] * 500
    last = GET + b"Connection: close\r\n\r\n"
    answer = running.talk(b"".join(requests)[:-300], b"".join(requests)[-300:] + last[:20], last[20:])
    assert answer.count(b"HTTP/1.1 200") == 1001
