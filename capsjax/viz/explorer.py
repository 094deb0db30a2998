"""The explorer: serves a page that shows a trained network, on the loopback address only."""

import asyncio
import contextlib
import dataclasses
import html
import io
import itertools
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from capsjax.data import Dataset
from capsjax.data.image_files import image_pixels
from capsjax.files import write_text
from capsjax.options import check_default, check_types, expand_paths, require_folder
from capsjax.training import ConfigError, load_network
from capsjax.viz.live import Live

_PAGE = Path(__file__).with_name("explorer.html")
_HOST = "127.0.0.1"
_MAX_BYTES = 2 * 2**20  # of a request
_MAX_SECONDS = 10.0  # until a request has arrived
_MAX_PIXELS = 2048**2  # of an upload
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
    " img-src blob: data:; connect-src 'self'; frame-ancestors 'none'"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExploreConfig:
    """Explore a trained network in the browser, on this machine only; Ctrl-C stops it."""

    run: Path
    """Run directory, or mnist_small for the network in the package."""

    port: int = 8317
    """Port on the loopback address; 0 for any free port."""

    checkpoint: str = "last"
    """Checkpoint: last, best (by validation error), or a step."""

    data_dir: Path | None = None
    """Directory of the run's data set, if it has moved since training."""

    export: Path | None = None
    """HTML file to write instead of serving: a page that needs no server."""

    examples: tuple[int, ...] | None = None
    """Indices of the test images in the exported page. By default, the first twelve."""

    def __post_init__(self) -> None:
        """Checks the options that can be checked without the run."""
        check_types(self)
        expand_paths(self, "data_dir", "export", remote=("run",))
        require_folder(self, "export")
        if self.export is None:
            check_default(self, "without --export", "examples")
        else:
            check_default(self, "with --export, which serves nothing", "port")
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"--port must be from 0 to 65535, got {self.port}")
        if self.export is not None and self.export.suffix not in (".html", ".htm"):
            raise ConfigError(f"--export must end in .html, got {self.export}")
        if self.examples == ():
            raise ConfigError("--examples must have at least one test image, got none")


def explore(config: ExploreConfig, *, dataset: Dataset | None = None) -> None:
    """Serves the explorer until it is interrupted, or writes the page that needs no server.

    Args:
      config: the options.
      dataset: images to explore instead of the run's.

    Raises:
      ConfigError: the port is in use, or the run cannot be explored.
      capsjax.data.DataError: the data set cannot be loaded.
      CheckpointError: the checkpoint cannot be read.
    """
    if config.export is not None:
        live = _live(config, dataset)
        count = len(live.test.labels)
        examples = tuple(range(min(12, count))) if config.examples is None else config.examples
        for n in examples:
            if not 0 <= n < count:
                raise ConfigError(
                    f"--examples must be from 0 to {count - 1}, the last test image, got {n}"
                )
        page = export(live, examples)
        write_text(config.export, page)
        print(f"wrote {config.export}, {len(page.encode()) / 1e6:.1f} MB")
        return
    with _listen(config.port) as listening:
        app = make_app(_live(config, dataset))
        port = listening.getsockname()[1]
        print(f"exploring {config.run} at http://{_HOST}:{port} (Ctrl-C stops it)", flush=True)
        server = Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        with contextlib.suppress(KeyboardInterrupt):  # ends the command normally
            server.run(sockets=[listening])


def _live(config: ExploreConfig, dataset: Dataset | None) -> Live:
    try:
        return Live(
            load_network(config.run, config.checkpoint, dataset=dataset, data_dir=config.data_dir)
        )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"run directory {config.run} cannot be explored: {error}") from None


def _listen(port: int) -> socket.socket:
    listening = socket.socket()
    # Allows a port that another explorer has just released.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((_HOST, port))
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"--port {port} is not available ({error.strerror}); choose another, or 0 for any free"
            " port"
        ) from None
    listening.listen(256)
    return listening


class Server(uvicorn.Server):
    """A server that stops without waiting for clients."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Cancels incomplete requests; complete ones take milliseconds."""
        for task in self.server_state.tasks:
            task.cancel()
        await super().shutdown(sockets)


class _TooLarge(Exception):
    """Raised when a request has more bytes than the explorer reads."""


def make_app(live: Live) -> Starlette:
    """Returns the explorer as an ASGI application, which serves no files."""

    async def page(_: Request) -> Response:
        text = _with_values(live.about())
        return HTMLResponse(text, headers={"Content-Security-Policy": _POLICY})

    def answering(work: Callable[[bytes], Response]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            # Other sites' pages could send requests, although they cannot read the responses.
            origin = request.headers.get("origin")
            if origin not in (None, f"http://{request.headers['host']}"):
                return _refusal(403, f"requests of {origin} are not answered")
            try:
                async with asyncio.timeout(_MAX_SECONDS):
                    body = await _body(request)
                return await run_in_threadpool(work, body)
            except _TooLarge:
                return _refusal(413, f"request must be at most {_MAX_BYTES // 2**20} MB")
            except TimeoutError:
                return _refusal(408, f"request must arrive within {_MAX_SECONDS:g} seconds")
            except ClientDisconnect:
                return _refusal(400, "the client has left")
            except asyncio.CancelledError:
                return _refusal(503, "the explorer has ended")
            except (ValueError, TypeError, KeyError, OverflowError) as error:
                missing = isinstance(error, KeyError)
                message = f"request must have {error}" if missing else str(error)
                return JSONResponse({"error": message}, 400)

        return answer

    def look(body: bytes) -> Response:
        return JSONResponse(live.look(_image(live, _values(body))))

    def upload(body: bytes) -> Response:
        return JSONResponse(live.look(read_image(body, live.network.config.image_shape)))

    def decode(body: bytes) -> Response:
        values = _values(body)
        return JSONResponse({"pixels": live.decode(values["pose"], values["class"])})

    def diagram(body: bytes) -> Response:
        values = _values(body)
        svg = live.diagram(
            _image(live, values), values.get("classes"), values.get("theme", "light")
        )
        return Response(svg, media_type="image/svg+xml")

    routes = [Route("/", page)]
    for name, work in (
        ("look", look),
        ("upload", upload),
        ("decode", decode),
        ("diagram", diagram),
    ):
        routes.append(Route(f"/api/{name}", answering(work), methods=["POST"]))
    # Refuses other sites' pages, which could reach the server through a host name of their own.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[_HOST, "localhost"])
    return Starlette(routes=routes, middleware=[hosts])


def _refusal(status: int, message: str) -> Response:
    """A response to a request whose body has not been read completely."""
    return JSONResponse({"error": message}, status, {"Connection": "close"})


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BYTES:
            raise _TooLarge
    return bytes(body)


def _values(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ValueError("request must be a JSON object")
    return values


def _image(live: Live, values: dict[str, Any]) -> np.ndarray:
    """Returns the image of a request, which holds its pixels or the numbers of test images."""
    if "test" in values:
        numbers = values["test"], values.get("other")
        if any(isinstance(n, bool) or not isinstance(n, int | None) for n in numbers):
            raise ValueError(f"test images must be integers, got {list(numbers)}")
        return live.test_image(*numbers)
    shape = live.network.config.image_shape
    pixels = np.asarray(values["pixels"])
    if pixels.size != np.prod(shape) or pixels.dtype.kind not in "iu":
        raise ValueError(f"pixels must be {int(np.prod(shape))} integers, got {pixels.size}")
    if pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(
            f"pixels must be from 0 to 255, got {int(pixels.min())} to {int(pixels.max())}"
        )
    return pixels.astype(np.uint8).reshape(shape)


def read_image(data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """Decodes an upload to ``[H, W, C]``; raises a ValueError if its size differs."""
    if shape[2] not in (1, 3, 4):
        raise ValueError(f"images must have 1, 3 or 4 channels to be read, got {shape[2]}")
    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "GIF", "WEBP", "BMP"]) as image:
            # Checked in the header, because a small file may decode to very many pixels.
            if image.width * image.height > _MAX_PIXELS:
                raise ValueError(
                    f"image must have at most {_MAX_PIXELS:,} pixels, got {image.width} x"
                    f" {image.height}"
                )
            pixels = image_pixels(image, channels=shape[2])
            if pixels.shape != shape:
                raise ValueError(
                    f"image must be {shape[1]} x {shape[0]} pixels, got {pixels.shape[1]} x"
                    f" {pixels.shape[0]}"
                )
            return pixels
    except (OSError, SyntaxError, Image.DecompressionBombError):
        raise ValueError("upload must be a PNG, JPEG, GIF, WebP or BMP image") from None


def export(live: Live, examples: tuple[int, ...]) -> str:
    """Returns a page with the examples and overlays of successive ones, which needs no server."""
    about = live.about()
    chosen: list[dict[str, Any]] = []
    pairs: list[tuple[int, int | None]] = [(n, None) for n in examples]
    pairs += list(itertools.pairwise(examples))[:4]
    for index, other in pairs:
        image = live.test_image(index, other)
        name = f"test image {index}" + (f" and {other}" if other is not None else "")
        svgs = {theme: live.diagram(image, None, theme) for theme in ("light", "dark")}
        chosen.append({"name": name, **live.look(image), "diagram": svgs})
    about["labels"] = []
    return _with_values({**about, "examples": chosen, "decoder": live.decoder_weights()})


def _with_values(about: dict[str, Any]) -> str:
    """Returns the page with the values in its script, escaped so that they cannot end it."""
    text = json.dumps(about).replace("<", "\\u003c")
    title = html.escape(f"Explorer: capsules on {about['dataset']}")
    page = _PAGE.read_text(encoding="utf-8")
    return page.replace("__TITLE__", title).replace("__ABOUT__", text)
