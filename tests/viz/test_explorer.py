"""The explorer's answers equal direct calls; bad requests get an error; the server stays up."""

import asyncio
import copy
import dataclasses
import io
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import uvicorn
from flax import nnx
from PIL import Image

from capsjax import models
from capsjax.cli import main
from capsjax.data import Split
from capsjax.viz import dissect, explorer
from capsjax.viz.explorer import ExploreConfig, Server, explore, export, make_app, read_image
from capsjax.viz.live import Live


def ask(url, data=None, headers=None):
    """Status and body of an answer."""
    body = json.dumps(data).encode() if isinstance(data, dict) else data
    request = urllib.request.Request(url, body, headers or {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def png(height, width, value=0):
    out = io.BytesIO()
    Image.fromarray(np.full((height, width), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


def test_a_look_equals_direct_calls(address, loaded, image):
    status, body = ask(f"{address}/api/look", {"test": 3})
    assert status == 200
    answered = json.loads(body)
    anatomy = dissect(loaded.network, image)
    lengths = jax.jit(loaded.network)(image).scores
    np.testing.assert_allclose(answered["lengths"], lengths, atol=1e-5)
    np.testing.assert_allclose(answered["poses"], anatomy.poses, atol=1e-5)
    np.testing.assert_allclose(answered["coupling"], anatomy.trace.coupling, atol=1e-5)
    np.testing.assert_allclose(answered["activations"], anatomy.trace.activations, atol=1e-5)
    for parent in (0, 9):
        made = jax.jit(loaded.network.decoder)(anatomy.poses, jnp.arange(10) == parent)
        np.testing.assert_allclose(
            np.array(answered["reconstructions"][parent]) / 255, made.ravel(), atol=0.51 / 255
        )
    # Drawn or uploaded, the same pixels get the same answer.
    pixels = loaded.test.images[3]
    assert (
        json.loads(ask(f"{address}/api/look", {"pixels": pixels.ravel().tolist()})[1]) == answered
    )
    out = io.BytesIO()
    Image.fromarray(pixels[..., 0]).save(out, "PNG")
    assert json.loads(ask(f"{address}/api/upload", out.getvalue())[1]) == answered


def test_decoding_equals_a_direct_call(address, loaded):
    pose = [0.1, -0.2, 0.3, 0.0, 0.25]
    _, body = ask(f"{address}/api/decode", {"pose": pose, "class": 4})
    poses = jnp.zeros((10, 5)).at[4].set(jnp.array(pose))
    made = jax.jit(loaded.network.decoder)(poses, jnp.arange(10) == 4)
    np.testing.assert_allclose(
        np.array(json.loads(body)["pixels"]) / 255, made.ravel(), atol=0.51 / 255
    )


def test_the_diagram_is_svg(address):
    status, body = ask(f"{address}/api/diagram", {"test": 3, "classes": [1, 2]})
    assert status == 200
    assert b"coupling-3-rest-2" in body


@pytest.mark.parametrize(
    ("where", "data", "status", "message"),
    [
        ("upload", b"this is no image", 400, "upload must be a PNG"),
        ("upload", png(28, 28)[:40], 400, "upload must be a PNG"),
        ("upload", png(30, 40), 400, "image must be 28 x 28 pixels, got 40 x 30"),
        (
            "upload",
            png(3000, 3000),
            400,
            "image must have at most 4,194,304 pixels, got 3000 x 3000",
        ),
        ("upload", bytes(50 * 2**20), 413, "request must be at most 2 MB"),
        ("look", b"[1]", 400, "request must be a JSON object"),
        ("look", b"\xff\xfe", 400, "request must be a JSON object"),
        ("look", {}, 400, "request must have 'pixels'"),
        ("look", {"pixels": [0] * 5}, 400, "pixels must be 784 integers, got 5"),
        ("look", {"pixels": [300] * 784}, 400, "pixels must be from 0 to 255, got 300 to 300"),
        ("look", {"pixels": [[1], [1, 2]]}, 400, ""),
        ("look", {"test": 40}, 400, "test image must be from 0 to 39, got 40"),
        ("look", {"test": "a"}, 400, "test images must be integers, got ['a', None]"),
        ("decode", {"pose": [1, 2], "class": 1}, 400, "pose must be 5 finite numbers, got [1, 2]"),
        ("decode", {"pose": [0] * 5, "class": 10}, 400, "class must be from 0 to 9, got 10"),
        ("diagram", {"test": 1, "classes": [77]}, 400, "classes must be from 0 to 9, got 77"),
        ("diagram", {"test": 1, "theme": "pink"}, 400, "theme must be one of light, dark"),
    ],
)
def test_bad_requests(address, where, data, status, message):
    try:
        came, body = ask(f"{address}/api/{where}", data)
    except (urllib.error.URLError, ConnectionError):
        # The answer came, and the connection was closed, while the client was still sending.
        assert status == 413
    else:
        assert came == status
        assert message in json.loads(body)["error"]
    assert ask(address)[0] == 200


@pytest.mark.parametrize(
    "path", ["/../../README.md", "/%2e%2e/cli.py", "/explorer.py", "//etc/passwd"]
)
def test_no_file_is_served(address, path):
    assert ask(address + path)[0] == 404


def test_other_hosts_names_are_refused(address):
    assert ask(address, headers={"Host": "elsewhere.example"})[0] == 400


async def answer(live, path="look", headers=(), messages=(), cancel=False):
    """The status that the application sends, without a server; the body never ends by itself."""
    sent, waiting = [], list(messages)

    async def receive():
        return waiting.pop() if waiting else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": f"/api/{path}",
        "query_string": b"",
        "headers": [(b"host", b"localhost:1"), *headers],
    }
    task = asyncio.ensure_future(make_app(live)(scope, receive, send))
    await asyncio.sleep(0)
    if cancel:
        task.cancel()
    await task
    return sent[0]["status"]


def test_clients_that_do_not_end_their_request(live, monkeypatch):
    half = {"type": "http.request", "body": b"{", "more_body": True}
    gone = {"type": "http.disconnect"}
    assert asyncio.run(answer(live, messages=[gone, half])) == 400
    assert asyncio.run(answer(live, messages=[half], cancel=True)) == 503
    monkeypatch.setattr(explorer, "_MAX_SECONDS", 0.01)
    assert asyncio.run(answer(live, messages=[half])) == 408


@pytest.mark.parametrize("origin", ["http://elsewhere.example", "http://localhost:2", "null"])
def test_pages_of_other_origins_get_no_answer(live, origin):
    assert asyncio.run(answer(live, headers=[(b"origin", origin.encode())])) == 403


def test_the_page_itself_gets_answers_and_cannot_be_framed(address):
    assert ask(f"{address}/api/look", {"test": 3}, {"Origin": address})[0] == 200
    with urllib.request.urlopen(address, timeout=60) as page:
        assert "frame-ancestors 'none'" in page.headers["Content-Security-Policy"]


def test_a_request_under_way_does_not_hold_the_server_up(live):
    server = Server(uvicorn.Config(make_app(live), port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    address = server.servers[0].sockets[0].getsockname()
    with socket.create_connection(address, timeout=60) as client:
        client.sendall(b"POST /api/look HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        while not server.server_state.tasks:
            time.sleep(0.01)
        server.should_exit = True
        assert client.recv(100).startswith(b"HTTP/1.1 503")
        thread.join(30)
    assert not thread.is_alive()


def test_a_hundred_requests_at_once(address):
    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda n: ask(f"{address}/api/look", {"test": n % 40}), range(100)))
    assert {status for status, _ in answers} == {200}
    assert answers[0] == answers[40]
    assert answers[0] != answers[1]


def test_the_exported_page_needs_no_server(live, loaded, image):
    page = export(live, (3, 5))
    start = page.index("const about = ") + len("const about = ")
    about, _ = json.JSONDecoder().raw_decode(page[start:])
    assert [example["name"] for example in about["examples"]] == [
        "test image 3",
        "test image 5",
        "test image 3 and 5",
    ]
    lengths = jax.jit(loaded.network)(image).scores
    np.testing.assert_allclose(about["examples"][0]["lengths"], lengths, atol=1e-5)
    assert "<svg" not in page  # no value in the script can end it
    assert 'src="http' not in page
    assert len(about["decoder"]) == 2


def test_fewer_test_images_than_a_page_shows_and_other_pixels(live, tmp_path, monkeypatch):
    few = copy.copy(live)
    few.test = Split(live.test.images[:3] / np.float32(255), live.test.labels[:3])
    monkeypatch.setattr("capsjax.viz.explorer._live", lambda *_: few)
    monkeypatch.setattr("capsjax.viz.explorer.export", lambda _, examples: str(examples))
    explore(ExploreConfig(run=tmp_path, export=tmp_path / "page.html"))
    assert (tmp_path / "page.html").read_text() == "(0, 1, 2)"
    for one, other in ((0, None), (0, 1)):
        shown, same = few.look(few.test_image(one, other)), live.look(live.test_image(one, other))
        assert shown["pixels"] == same["pixels"]
        np.testing.assert_allclose(shown["lengths"], same["lengths"], rtol=1e-5)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_of_an_upload_is_laid_on_white(mode):
    file = io.BytesIO()
    Image.new(mode, (3, 2), (0,) * len(mode)).save(file, "png")
    assert (read_image(file.getvalue(), (2, 3, 1)) == 255).all()
    with pytest.raises(ValueError, match="images must have 1, 3 or 4 channels to be read, got 2"):
        read_image(file.getvalue(), (2, 3, 2))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (models.configure("baseline"), "network must be a CapsNet.*got BaselineCNN"),
        (models.configure("small", decoder_features=()), "network must have a decoder"),
        (
            models.configure("small", routing="uniform"),
            "must have a routing that can be traced",
        ),
    ],
)
def test_networks_that_cannot_be_explored(loaded, config, message):
    # Shapes are enough: the baseline has 35 million parameters.
    network = nnx.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=message):
        Live(dataclasses.replace(loaded, network=network))


def test_a_port_in_use(run, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as stopped:
            main(["explore", str(run), "--port", str(port)])
    assert stopped.value.code == 2
    assert f"--port {port} is not available (Address already in use)" in capsys.readouterr().err


def test_explore_needs_a_run(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["explore", str(tmp_path), "--export", str(tmp_path / "page.html")])
    assert stopped.value.code == 2
    assert "holds no run" in capsys.readouterr().err
    assert not os.listdir(tmp_path)
