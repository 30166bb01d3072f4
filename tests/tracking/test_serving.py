"""The served champion, over real HTTP: right answers, and clear ones to whatever else is sent."""

import asyncio
import io
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import psutil
import pytest
import requests
from PIL import Image

from pipeline import files, http_server
from pipeline.data import image_files
from pipeline.data.splits import TEST, read_dataset, read_split
from pipeline.tracking import registry
from tests.conftest import REPOSITORY, free_port, run_command
from tests.data.test_image_files import encoded, png
from tests.drawn import drawn
from tests.test_readme import fenced

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server(_all_stages: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Its address, and its process."""
    port = free_port()
    command = [sys.executable, "-m", "pipeline.serve", "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(_all_stages)}
    for stale in _all_stages.glob("PWNED"):
        stale.unlink()
    with subprocess.Popen(command, cwd=_all_stages, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"loading champion ...\n"
        assert process.stdout.readline().decode() == (f"mnist-5k-cnn version 1 is served at http://127.0.0.1:{port}\n")
        address = f"http://127.0.0.1:{port}"
        for _ in range(100):
            try:
                assert requests.get(f"{address}/health", timeout=5).status_code == 200
                break
            except requests.ConnectionError:
                time.sleep(0.1)
        yield address, psutil.Process(process.pid)
        process.terminate()


def ask(address: str, images: Any, key: str = "inputs") -> requests.Response:
    content = images.tolist() if isinstance(images, np.ndarray) else images
    return requests.post(f"{address}/invocations", json.dumps({key: content}), headers=JSON, timeout=60)


@pytest.mark.slow
def test_a_thousand_requests_of_mixed_sizes_get_the_labels_of_the_predictions(
    server: tuple[str, psutil.Process], finished: Path
) -> None:
    address, _ = server
    images = read_split(read_dataset(), TEST).images.numpy()
    predicted = [row["predicted"] for row in files.read_table(files.PREDICTIONS, made_by="evaluate")]
    generator = np.random.default_rng(0)

    def one(request: int) -> bool:
        rows = generator.integers(len(images), size=1 + request % 40)
        answer = ask(address, images[rows], ("inputs", "instances")[request % 2])
        labels = [str(np.argmax(each)) for each in answer.json()["predictions"]]
        return labels == [predicted[row] for row in rows]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(1000)))


def test_the_answer_says_which_images_do_not_look_like_the_training_images(
    server: tuple[str, psutil.Process], finished: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1, 28, 28, 1), dtype=np.uint8)
    digits = read_split(read_dataset(), TEST).images[:2].numpy()
    answer = ask(server[0], np.concatenate([digits[:1], noise, digits[1:]])).json()
    assert answer["unlike_training"] == [False, True, False]
    assert len(answer["predictions"]) == 3


BLACK = np.zeros((2, 28, 28, 1), dtype=int)
REFUSED: dict[str, tuple[int, str, Any]] = {
    "a shape that is not the network's": (400, "images of shape (2, 20, 28, 1)", BLACK[:, :20]),
    "one image without a batch": (400, "images of shape (28, 28, 1)", BLACK[0]),
    "no images": (400, "images of shape (0,)", []),
    "a picture that is not even": (400, "images of shape (2, 28)", [[[[0]] * 28] * 28, [[[0]] * 3] * 28]),
    "text": (400, "pixels are whole numbers", [[[["7"]] * 28] * 28]),
    "NaN": (400, "pixels are whole numbers", [[[[float("nan")]] * 28] * 28]),
    "null": (400, "images of shape ()", None),
    "pixels in 0 ... 1": (400, "pixels are whole numbers", BLACK + 0.5),
    "above 255": (400, "pixels are whole numbers", BLACK + 256),
    "below 0": (400, "pixels are whole numbers", BLACK - 1),
    "a number without end": (400, "pixels are whole numbers", [[[[10**40]] * 28] * 28]),
    "true": (400, "pixels are whole numbers", [[[[True]] * 28] * 28]),
    "objects": (400, "pixels are whole numbers", [[[[{}]] * 28] * 28]),
    "1,001 images": (400, "N from 1 to 1,000", np.zeros((1001, 28, 28, 1), dtype=int)),
}


@pytest.mark.faults
@pytest.mark.parametrize("what", REFUSED)
def test_fault_24_invalid_images_are_refused_with_the_reason(server: tuple[str, psutil.Process], what: str) -> None:
    status, reason, images = REFUSED[what]
    answer = ask(server[0], images)
    assert answer.status_code == status
    assert reason in answer.json()["error"]


ROW = b"[" + b",".join([b"[0]"] * 28) + b"]"
IMAGE = b"[" + b",".join([ROW] * 28) + b"]"
TOO_MANY = b'{"inputs":[' + b",".join([IMAGE] * 100_000) + b"]}"
GOOD = json.dumps({"inputs": BLACK.tolist()}).encode()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("body", "headers", "status", "reason"),
    [
        (GOOD, {}, 415, "the content type must be application/json"),
        (GOOD, {"Content-Type": "text/csv"}, 415, "the content type must be application/json"),
        (b"cos\nsystem\n(S'touch PWNED'\ntR.", {"Content-Type": "application/octet-stream"}, 415, "application/json"),
        (GOOD[:-5], JSON, 400, "not JSON"),
        (b"\xff\xfe", JSON, 400, "not JSON"),
        (b'{"inputs":' + b"[" * 100_000, JSON, 400, "not JSON"),
        (b"[1, 2]", JSON, 400, "an object with one key"),
        (b'{"inputs": [], "instances": []}', JSON, 400, "an object with one key"),
        (b'{"dataframe_split": {}}', JSON, 400, "an object with one key"),
        (b"", JSON, 400, "not JSON"),
        (TOO_MANY, JSON, 413, "at most 1,000 images at a time"),
    ],
)
def test_fault_24_invalid_bodies_are_refused_with_the_reason(
    server: tuple[str, psutil.Process], body: bytes, headers: dict[str, str], status: int, reason: str
) -> None:
    answer = requests.post(f"{server[0]}/invocations", body, headers=headers, timeout=60)
    assert answer.status_code == status
    assert reason in answer.json()["error"]
    assert not list(Path(server[1].cwd()).glob("PWNED"))
    assert requests.post(f"{server[0]}/invocations", GOOD, headers=JSON, timeout=60).status_code == 200


@pytest.mark.faults
@pytest.mark.slow
def test_fault_24_two_hundred_at_once_are_all_answered_with_the_memory_of_a_few(
    server: tuple[str, psutil.Process],
) -> None:
    address, process = server
    large = json.dumps({"inputs": np.full((100, 28, 28, 1), 255).tolist()}).encode()

    def answered(_: int) -> int:
        return requests.post(f"{address}/invocations", large, headers=JSON, timeout=500).status_code

    def most_memory(at_once: int) -> int:
        most = 0
        with ThreadPoolExecutor(at_once) as pool:
            waiting = [pool.submit(answered, number) for number in range(at_once)]
            while not all(each.done() for each in waiting):
                most = max(most, process.memory_info().rss)
                time.sleep(0.05)
        assert {each.result() for each in waiting} == {200}
        return most

    before = process.memory_info().rss
    of_a_few = max(most_memory(at_once=8) for _ in range(5))  # the allocator comes to rest
    assert most_memory(at_once=200) - before < 1.5 * (of_a_few - before) + 50_000_000


@pytest.mark.faults
def test_fault_24_a_hundred_thousand_rows_and_endless_words_take_no_memory(server: tuple[str, psutil.Process]) -> None:
    address, process = server
    words = json.dumps({"inputs": ["a" * 1_000_000, *["b"] * 5000]}).encode()  # 20 GB as an array of text
    before = process.memory_info().rss
    for body, status in ((TOO_MANY, 413), (words, 400)):
        answer = requests.post(f"{address}/invocations", body, headers=JSON, timeout=60)
        assert answer.status_code == status
        assert process.memory_info().rss - before < 100_000_000


def picture(digit: int, form: str = "JPEG") -> bytes:
    """A drawn digit as the content of a file."""
    if form == "HEIF":
        pillow_heif.register_heif_opener()
    return encoded(drawn(digit, 20), form)


def send(address: str, body: bytes, content_type: str, **headers: str) -> requests.Response:
    return requests.post(f"{address}/invocations", body, headers={"Content-Type": content_type} | headers, timeout=60)


def predicted(content: bytes) -> dict[str, Any]:
    """The answer of `predict` for a picture."""
    loaded = registry.load(registry.find("champion"))
    image = image_files.read(io.BytesIO(content), "it", loaded.preprocessing).image
    (probabilities,), (unlike,) = loaded.classify(image[None])
    return registry.described(None, dict(zip(loaded.class_names, probabilities.tolist(), strict=True)), unlike)


@pytest.mark.parametrize(
    ("form", "content_type"),
    [("JPEG", "image/jpeg"), ("PNG", "image/png"), ("HEIF", "image/heic"), ("WEBP", "IMAGE/*; q=1")],
)
def test_a_picture_as_the_body_gets_the_answer_of_predict(
    server: tuple[str, psutil.Process], finished: Path, form: str, content_type: str
) -> None:
    answer = send(server[0], picture(7, form), content_type)
    assert answer.status_code == 200
    (found,) = answer.json()["predictions"]
    expected = predicted(picture(7, form))
    assert found.pop("probabilities") == pytest.approx(expected.pop("probabilities"), abs=1e-5)
    assert found.pop("probability") == pytest.approx(expected.pop("probability"), abs=1e-5)
    assert found == expected


def test_several_pictures_are_answered_by_their_names(server: tuple[str, psutil.Process], finished: Path) -> None:
    names = {"drei.jpg": picture(3), "sieben ü.png": picture(7, "PNG"), "zero": picture(0)}
    files = [("picture", (name, content)) for name, content in names.items()]
    answer = requests.post(f"{server[0]}/invocations", files=files, timeout=60)
    assert answer.status_code == 200
    found = {each["file"]: each["label"] for each in answer.json()["predictions"]}
    assert found == {name: predicted(content)["label"] for name, content in names.items()}


def form(*contents: bytes, end: bytes = b"\r\n--x--") -> bytes:
    """The body of a form with these files, named 1.jpg and so on, whose boundary is x."""
    head = 'Content-Disposition: form-data; name="picture"; filename="{}.jpg"\r\n\r\n'
    parts = [head.format(number).encode() + content for number, content in enumerate(contents, start=1)]
    return b"--x" + b"\r\n--x".join(b"\r\n" + part for part in parts) + end


FORM = "multipart/form-data; boundary=x"
BOMB = png((60_000, 60_000), 1, 0, b"")
REFUSED_PICTURES: dict[str, tuple[int, str, bytes, str]] = {
    "text": (422, "the body is not a picture; allowed: AVIF, BMP", b"words", "image/jpeg"),
    "nothing": (422, "the body is empty", b"", "image/jpeg"),
    "a picture that was cut off": (422, "the body cannot be read: ", picture(3, "PNG")[:-100], "image/png"),
    "a blank picture": (422, "the body is blank", encoded(Image.new("L", (50, 50))), "image/png"),
    "a bomb": (422, "the body has more than 300,000,000 pixels", BOMB, "image/png"),
    "a vector graphic": (422, "the body is not a picture", b"<svg width='9'/>", "image/svg+xml"),
    "a part that is text": (422, "part 2 (2.jpg) is not a picture", form(picture(3), b"words"), FORM),
    "a part without content": (422, "part 1 (1.jpg) is empty", form(b""), FORM),
    "a form that was cut off": (400, "the body was cut off", form(picture(3), end=b""), FORM),
    "a form without boundary": (400, "needs a boundary", form(picture(3)), "multipart/form-data"),
    "a form without parts": (400, "1 to 1,000 pictures at a time", b"--x--", FORM),
    "1,001 parts": (413, "1 to 1,000 pictures at a time", form(*[b""] * 1001), FORM),
    "100 MB": (413, "more than 100,000,000 bytes", bytes(100_000_001), "image/jpeg"),
    "an unknown type": (415, "(arrays), image/... (a picture) or multipart/form-data", b"", "text/csv"),
}  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("what", REFUSED_PICTURES)
def test_fault_24_what_is_not_a_picture_is_refused_with_the_reason(
    server: tuple[str, psutil.Process], what: str
) -> None:
    status, reason, body, content_type = REFUSED_PICTURES[what]
    answer = send(server[0], body, content_type)
    assert answer.status_code == status
    assert reason in answer.json()["error"]
    assert "\n" not in answer.json()["error"]
    assert send(server[0], picture(3), "image/jpeg").status_code == 200


@pytest.mark.faults
def test_a_decoder_that_is_killed_or_hangs_ends_neither_the_server_nor_its_other_answers(
    server: tuple[str, psutil.Process],
) -> None:
    (decoder,) = server[1].children()
    decoder.kill()
    assert send(server[0], picture(3), "image/jpeg").status_code == 200
    (decoder,) = server[1].children()
    decoder.suspend()
    with ThreadPoolExecutor() as pool:
        waits = pool.submit(send, server[0], picture(3), "image/jpeg")
        assert ask(server[0], BLACK).status_code == 200
        decoder.resume()
        assert waits.result(60).status_code == 200


def test_a_form_on_a_page_of_another_site_is_refused(server: tuple[str, psutil.Process]) -> None:
    for origin, status in (("https://evil.example", 403), ("null", 403), (server[0], 200)):
        assert send(server[0], form(picture(3)), FORM, Origin=origin).status_code == status


# Not every system has curl, and pip cannot install it. CI is not let through without it (.ci/run).
@pytest.mark.skipif(
    not shutil.which("curl"),
    reason="types the requests that docs/serving.md shows, which are commands of curl, a program that this system does "
    "not have and pip cannot install; the tests beside it send the same requests from Python",
)
def test_the_requests_of_the_documentation_are_answered(server: tuple[str, psutil.Process], tmp_path: Path) -> None:
    (block,) = (block for block in fenced(REPOSITORY / "docs/serving.md", "bash") if "curl" in block)
    (tmp_path / "digit.jpg").write_bytes(picture(3))
    (tmp_path / "other.png").write_bytes(picture(7, "PNG"))
    commands = block.replace("\\\n", "").splitlines()
    asked = [line.replace("http://127.0.0.1:5002", server[0]) for line in commands if line.startswith("curl")]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    answers = []
    for command in asked:
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, check=True, timeout=60
        )
        answers.append(json.loads(done.stdout)["predictions"])
    assert [len(answer) for answer in answers] == [1, 2, 1]
    assert [each["file"] for each in answers[1]] == ["digit.jpg", "other.png"]


def test_requests_with_another_host_name_are_refused(server: tuple[str, psutil.Process]) -> None:
    for path in ("/invocations", "/health", "/version"):
        for host, status in (("evil.example", 400), ("127.0.0.1.evil.example", 400), ("localhost", 200)):
            headers = JSON | {"Host": host}
            ask_for = requests.post if path == "/invocations" else requests.get
            answer = ask_for(f"{server[0]}{path}", data=GOOD, headers=headers, timeout=60)
            assert answer.status_code == status, (path, host)


FIELDS = ("POST /invocations HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Content-Length: 999")
HEAD = "\r\n".join([*FIELDS, "", "{"]).encode()


@pytest.mark.faults
def test_incomplete_requests_do_not_delay_others(server: tuple[str, psutil.Process]) -> None:
    port = int(server[0].rpartition(":")[2])
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(socket.create_connection(("127.0.0.1", port))).sendall(HEAD)
        started = time.monotonic()
        assert ask(server[0], BLACK).status_code == 200
        assert time.monotonic() - started < 5
    assert ask(server[0], BLACK).status_code == 200


@pytest.mark.faults
@pytest.mark.slow
def test_hundreds_of_slow_clients_stop_no_other_and_fill_no_log(finished: Path, tmp_path: Path) -> None:
    """With few files, as in a container: 100 clients trickle, 200 say nothing, and then the server is stopped."""
    port = free_port()
    command = f"ulimit -n 128; exec {sys.executable} -m pipeline.serve --port {port}"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "DVC_ROOT": str(finished)}
    log = tmp_path / "log"
    with (
        log.open("wb") as file,
        subprocess.Popen(
            ["sh", "-c", command], cwd=finished, env=environment, stdout=subprocess.PIPE, stderr=file
        ) as process,
        ExitStack() as stack,
    ):
        stack.callback(process.kill)
        assert process.stdout is not None
        assert b"is served at" in b"".join(itertools.islice(process.stdout, 2))
        trickling, _silent = ([stack.enter_context(connection(port)) for _ in range(count)] for count in (100, 200))
        before, started = psutil.Process(process.pid).cpu_times(), time.monotonic()
        for _ in range(10):
            for each in trickling:
                with suppress(OSError):  # the server has closed it, for a newer one
                    each.sendall(HEAD[:1] if each is trickling[0] else HEAD)
            asked = time.monotonic()
            assert ask(f"http://127.0.0.1:{port}", BLACK).status_code == 200
            assert time.monotonic() - asked < 5
            time.sleep(0.2)
        after, seconds = psutil.Process(process.pid).cpu_times(), time.monotonic() - started
        assert after.user + after.system - before.user - before.system < 0.7 * seconds
        process.terminate()
        assert process.wait(15) == 128 + signal.SIGTERM
    assert log.stat().st_size < 10_000, log.read_text()[:2000]


def connection(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


@pytest.mark.faults
def test_a_connection_that_sends_no_request_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that says nothing nor one whose head comes byte by byte, also after an answer."""
    monkeypatch.setattr(http_server, "HEAD_TIMEOUT", 0.5)

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def clients(port: int) -> None:
        request = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for beginning in (b"", request):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(beginning)
            started = time.monotonic()
            with suppress(ConnectionError):
                while not reader.at_eof() and time.monotonic() - started < 5:
                    writer.write(b"G" if beginning == request else b"")
                    with suppress(TimeoutError):
                        await asyncio.wait_for(reader.read(1000), 0.1)
            assert 0.4 < time.monotonic() - started < 3
            writer.close()

    async def both() -> None:
        with http_server.listen("127.0.0.1", 0) as listening:
            server = http_server.server(answer)
            serving = asyncio.create_task(server.serve(sockets=[listening]))
            await clients(listening.getsockname()[1])
            server.should_exit = True
            await serving

    asyncio.run(both())


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(finished: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = run_command("serve", "--port", str(port), folder=finished)
    assert done.returncode == 2
    assert done.stderr.decode() == (
        f"error: 127.0.0.1:{port} cannot be listened at (Address already in use): choose another --port\n"
    )
    assert b"served" not in done.stdout


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_an_invalid_port_is_reported(workspace: Path, port: str) -> None:
    done = run_command("serve", "--port", port, folder=workspace)
    assert done.returncode == 2
    assert f"{port} is not a port; allowed: 1 to 65535" in done.stderr.decode()


@pytest.mark.slow
def test_mlflows_own_server_answers_the_same(server: tuple[str, psutil.Process], finished: Path) -> None:
    port = free_port()
    command = ["models", "serve", "--model-uri", "models:/mnist-5k-cnn@champion", "--env-manager", "local"]
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{finished / 'mlflow.db'}",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    images = read_split(read_dataset(), TEST).images[:20].numpy()
    started = [sys.executable, "-m", "mlflow", *command, "--port", str(port)]
    with subprocess.Popen(started, env=environment, start_new_session=True) as process:
        try:
            for _ in range(600):
                try:
                    requests.get(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except requests.ConnectionError:
                    time.sleep(0.1)
            theirs = ask(f"http://127.0.0.1:{port}", images)
            assert theirs.status_code == 200
        finally:
            os.killpg(process.pid, signal.SIGTERM)
    np.testing.assert_allclose(theirs.json()["predictions"], ask(server[0], images).json()["predictions"], atol=1e-5)
