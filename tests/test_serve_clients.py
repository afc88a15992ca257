"""``megagpt serve`` and its clients: where it is full, when they hang up or are slow, and how it ends."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

pytest.importorskip("starlette", reason="starlette is not installed (extra serve)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra serve)")

from serve_common import KEY, ask, post, post_head, serving_run, write_run

from megagpt.serve import guard
from megagpt.serve import server as serving
from megagpt.serve.server import PatientProtocol

LONG = 50_000  # tokens, more than any test waits for


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def server(run):
    with serving_run(run) as running:
        yield running


def begin_long(server, *, stream=True, n=1):
    """A connection on which answers are awaited that nobody has the time for."""
    connection = server.connect()
    connection.sendall(long_request(stream=stream, n=n))
    return connection


def long_request(**options):
    """Of more tokens than come in the time of a test; the likeliest one never ends the text."""
    return post(**{"prompt": "x", "max_tokens": LONG, "temperature": 0, "stream": True, **options})


def wait_for_load(server, wanted):
    for _ in range(2000):
        if server.load == wanted:
            return
        asyncio.run(asyncio.sleep(0.01))
    raise AssertionError(f"{server.load} and not {wanted}")


def test_a_full_server_says_so_and_goes_on_when_there_is_room(run):
    with serving_run(run, rows=2, limit=4) as server:
        with begin_long(server, n=3), begin_long(server, stream=False):
            wait_for_load(server, (2, 2))
            status, answer, headers = ask(server, {"prompt": "y"})
            assert (status, answer["error"]["type"], headers["Retry-After"]) == (429, "rate_limit_error", "1")
        server.wait_until_idle()
        assert ask(server, {"prompt": "y"})[0] == 200


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_hangs_up_frees_its_rows(server, stream):
    with begin_long(server, stream=stream, n=3) as connection:
        wait_for_load(server, (3, 0))
        if stream:
            assert b"data: " in connection.recv(1000) + connection.recv(1000)
    server.wait_until_idle()


def ends_without_answer(connection):
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_slow_clients_are_cut_off_and_delay_nobody(run, monkeypatch):
    class Impatient(PatientProtocol):
        head_seconds = read_seconds = 0.5

        def connection_made(self, transport):
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            super().connection_made(transport)

    monkeypatch.setattr(serving, "PatientProtocol", Impatient)
    with serving_run(run, rows=2, body_seconds=0.5) as server:
        with server.connect() as silent, server.connect() as half_a_head, server.connect() as half_a_body:
            half_a_head.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: ")
            half_a_body.sendall(post_head(100) + b"{")
            assert half_a_body.recv(100).startswith(b"HTTP/1.1 408 ")
            assert ends_without_answer(silent)
            assert ends_without_answer(half_a_head)
        with socket.socket() as deaf:  # it reads nothing, and soon the buffers between are full
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", server.port))
            deaf.sendall(long_request())
            wait_for_load(server, (1, 0))
            assert ask(server, {"prompt": "y", "max_tokens": 40})[0] == 200
            server.wait_until_idle(60)  # so it has been cut off: its answer is far from finished


def test_a_step_that_fails_fails_its_texts_and_no_others(run, monkeypatch, caplog):
    with serving_run(run, rows=2) as server:
        steps = iter([RuntimeError("out of memory")])
        real = server.worker._generation.step

        def step():
            for error in steps:
                raise error
            return real()

        monkeypatch.setattr(server.worker._generation, "step", step)
        status, answer, _ = ask(server, {"prompt": "x"})
        assert (status, answer["error"]["type"]) == (500, "server_error")
        assert "memory" not in answer["error"]["message"]
        assert "out of memory" in caplog.text
        assert ask(server, {"prompt": "x"})[0] == 200
        assert server.load == (0, 0)


def test_what_is_not_finished_when_a_server_stops_ends_with_an_error(run):
    with (
        serving_run(run, rows=1, grace=0) as server,
        begin_long(server) as stream,
        begin_long(server, stream=False) as whole,
    ):
        wait_for_load(server, (1, 1))
        server.server.should_exit = True
        assert read_all(whole).startswith(b"HTTP/1.1 503 ")
        assert b"server_stopping" in read_all(stream)


def test_a_second_interrupt_ends_a_server_at_once_and_without_a_traceback(run, caplog):
    with serving_run(run, rows=1, grace=600) as server, begin_long(server):
        wait_for_load(server, (1, 0))
        server.server.should_exit = server.server.force_exit = True  # as uvicorn does then
    assert "Traceback" not in caplog.text


def test_a_server_that_generates_no_more_is_not_well(run):
    """It said that it was, for ever."""
    with serving_run(run) as server:
        assert ask(server, None, method="GET", path="/health")[:2] == (200, {"status": "ok"})
        server.worker.close()
        assert ask(server, None, method="GET", path="/health")[0] == 503
        assert ask(server, {"prompt": "x"})[0] == 503


def read_all(connection):
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_the_command_serves_and_stops_gracefully_and_shows_no_key(run, tmp_path):
    """SIGTERM in the midst of a stream: the stream is finished, new connections are refused, the exit code is 0."""
    command = [sys.executable, "-m", "megagpt", "serve", "--from", str(run), "--port", "0", "--name", "served"]
    env = {**os.environ, guard.VARIABLE: KEY}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = ""
            while "is served at" not in said:
                line = process.stderr.readline()
                assert line, said
                said += line
            port = int(re.search(r"^served is served at http://127\.0\.0\.1:(\d+);", said, re.MULTILINE)[1])

            taken = [str(port) if word == "0" else word for word in command]
            refused = subprocess.run(taken, env=env, capture_output=True, text=True, timeout=120)
            assert refused.returncode == 2
            assert f"cannot listen at 127.0.0.1, port {port}" in refused.stderr

            with socket.create_connection(("127.0.0.1", port), timeout=60) as wrong:
                wrong.sendall(post_head(2, f"Authorization: Bearer {KEY}0") + b"{}")
                assert wrong.recv(100).startswith(b"HTTP/1.1 401 ")
                wrong.sendall(b"\0\0" + KEY.encode() + b"\r\n\r\n")  # what is no HTTP at all
            with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                content = json.dumps({"max_tokens": 1000, "temperature": 0, "stream": True}).encode()
                connection.sendall(post_head(len(content), f"Authorization: Bearer {KEY}") + content)
                answer = connection.recv(1000)
                process.send_signal(signal.SIGTERM)
                answer += read_all(connection)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b"data: [DONE]" in answer
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert err.endswith("stopped\n")
    assert KEY not in said + out + err + refused.stderr
