"""Data for the tests, which write to temporary directories only."""

import gzip
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).parents[2].parent / "shared"


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory, monkeypatch) -> Path:
    """A temporary cache: the user's is neither read nor written."""
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def prepared() -> Path:
    """A TFDS data directory with MNIST and Fashion-MNIST."""
    pytest.importorskip("tensorflow_datasets")
    if not (SHARED / "tfds").is_dir():
        pytest.skip("needs the prepared TFDS sets, which do not come with the repository")
    return SHARED / "tfds"


@pytest.fixture(scope="session")
def originals() -> Path:
    """The original files of both sets."""
    if not (SHARED / "idx").is_dir():
        pytest.skip("needs the original IDX files, which do not come with the repository")
    return SHARED / "idx"


def read_original(path: Path) -> np.ndarray:
    """Reads an IDX file without the package's code."""
    data = gzip.decompress(path.read_bytes())
    axes = data[3]
    shape = np.frombuffer(data, ">u4", count=axes, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


class Server:
    """A server on the loopback address, with its files in memory."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.status = 200
        files, server = self.files, self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                body = files.get(self.path, b"")
                self.send_response(server.status if self.path in files else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()

            def do_GET(self) -> None:
                self.do_HEAD()
                self.wfile.write(files.get(self.path, b""))

            def log_message(self, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/"


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    running = Server()
    thread = threading.Thread(target=running.http.serve_forever)
    thread.start()
    yield running
    running.http.shutdown()
    running.http.server_close()
    thread.join()
