"""`make audit` against a vulnerability database of this machine: OSV's answers, from a server on loopback."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.conftest import REPOSITORY, free_port

pytestmark = pytest.mark.faults

KNOWN = {"werkzeug": "GHSA-0000-0000-0000"}


@pytest.fixture
def asked() -> list[str]:
    """The packages that the database was asked about."""
    return []


@pytest.fixture
def osv(asked: list[str]) -> Iterator[str]:
    """The address of a database that knows of one vulnerability."""

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = question.get("package", {}).get("name")
            answer: dict[str, Any] = {}
            if name:
                asked.append(name)
            if name in KNOWN:
                affected = [{"package": {"name": name, "ecosystem": "PyPI"}, "ranges": []}]
                answer = {"vulns": [{"id": KNOWN[name], "summary": "a known hole", "affected": affected}]}
            body = json.dumps(answer).encode()
            self.send_response(200 if name else 400)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing on stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
        server.shutdown()


def audit(address: str, exceptions: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / ".ci/audit.py"), "--osv-url", address, "--exceptions", str(exceptions)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, check=False)


@contextmanager
def answering(said: bytes) -> Iterator[str]:
    """The address of a socket that says this to everybody, whatever is asked, and no more."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):  # closed below
                while True:
                    caller, _ = server.accept()
                    with caller:
                        caller.recv(65536)
                        caller.sendall(said)
                        caller.shutdown(socket.SHUT_WR)
                        while caller.recv(65536):  # closed with something unread, it would be a broken connection
                            pass

        Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1/query"
        server.shutdown(socket.SHUT_RDWR)  # wakes the thread


@pytest.fixture
def exceptions(tmp_path: Path) -> Path:
    path = tmp_path / "accepted.txt"
    path.write_text("# a comment\n")
    return path


def test_fault_31_a_known_vulnerability_is_named(osv: str, asked: list[str], exceptions: Path) -> None:
    found = audit(osv, exceptions)
    assert found.returncode == 1
    assert KNOWN["werkzeug"] in found.stdout
    locked = re.findall(r"^([\w.-]+)==", (REPOSITORY / "requirements.lock").read_text(), re.MULTILINE)
    # Some are for other systems than this one.
    assert set(asked) <= set(locked)
    assert {"torch", "mlflow", "dvc", "optuna", "werkzeug"} <= set(asked)


def test_fault_31_an_exception_has_a_reason(osv: str, exceptions: Path) -> None:
    exceptions.write_text(f"{KNOWN['werkzeug']} only its debugger is concerned, which nothing here starts\n")
    passed = audit(osv, exceptions)
    assert passed.returncode == 0, passed.stderr
    assert "only its debugger is concerned" in passed.stdout
    exceptions.write_text(f"{KNOWN['werkzeug']}\n")
    refused = audit(osv, exceptions)
    assert refused.returncode == 1
    assert "accepted without a reason" in refused.stderr


def test_fault_31_a_database_out_of_reach_is_no_all_clear(exceptions: Path) -> None:
    nobody = f"http://127.0.0.1:{free_port()}/v1/query"
    refused = audit(nobody, exceptions)
    assert refused.returncode == 1
    assert "was NOT audited" in refused.stderr
    let_pass = audit(nobody, exceptions, "--if-reachable")
    assert let_pass.returncode == 0
    assert "was NOT audited" in let_pass.stderr


REFUSAL = b'{"code": 403, "message": "not from here"}'


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"", "Remote end closed connection without response"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH-2.0-OpenSSH_9.2"),
        (
            b"HTTP/1.1 403 Forbidden\r\nContent-Length: 41\r\n\r\n" + REFUSAL,
            "the server there, with HTTP 403, is not OSV",
        ),
        (
            b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
            "the server there, with HTTP 503, is not OSV",
        ),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n<html>log in</html>\n",
            "the server there, with HTTP 200, is not OSV",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{", "IncompleteRead(1 bytes read, 19 more expected)"),
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 20\r\n\r\n{", "IncompleteRead(1 bytes read, 19 more expected)"),
    ],
    ids=["nothing", "another protocol", "a refusal", "a failure", "a page", "half an answer", "half a refusal"],
)
def test_fault_31_a_server_that_is_not_osv_does_not_pass(exceptions: Path, said: bytes, reason: str) -> None:
    with answering(said) as address:
        refused, let_pass = audit(address, exceptions), audit(address, exceptions, "--if-reachable")
    assert (refused.returncode, let_pass.returncode) == (1, 0)
    assert refused.stderr == let_pass.stderr
    assert refused.stderr == f"requirements.lock was NOT audited: {address} cannot be reached: {reason}\n"


def test_fault_31_what_osv_says_of_no_package_begins_the_audit(exceptions: Path) -> None:
    """Whether it answers the empty question with nothing found or, as the database above, with a refusal."""
    with answering(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}") as address:
        done = audit(address, exceptions, "--if-reachable")
    assert done.returncode == 0
    assert done.stderr.endswith("\nNo known vulnerabilities found\n")
