"""The explorer: a page on the loopback address that shows a live network."""

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
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from capsjax.training import ConfigError, load_network
from capsjax.viz.live import Live

_PAGE = Path(__file__).with_name("explorer.html")
_HOST = "127.0.0.1"
_LARGEST = 2 * 2**20  # bytes of a request
_MOST_PIXELS = 2048**2  # of an upload
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
    " img-src blob: data:; connect-src 'self'"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExploreConfig:
    """Explore a trained network in the browser, on this machine only; Ctrl-C ends it."""

    run: Path
    """Directory of the run, or mnist_small, the network in the package."""

    port: int = 8317
    """Port on the loopback address; 0 for any that is free."""

    checkpoint: str = "last"
    """Which checkpoint: last, best (by validation error), or a step."""

    export: Path | None = None
    """Write a page that needs no server to this file, and end."""

    examples: tuple[int, ...] = tuple(range(12))
    """Numbers of the test images in the exported page."""

    def __post_init__(self) -> None:
        """Checks every option that can be checked without the run."""
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"--port must be from 0 to 65535, got {self.port}")
        if self.export is not None and self.export.suffix not in (".html", ".htm"):
            raise ConfigError(f"--export must end in .html, got {self.export}")
        if not self.examples:
            raise ConfigError("--examples must name a test image")


def explore(config: ExploreConfig) -> None:
    """Serves the explorer until it is interrupted, or writes the page that needs no server.

    Raises:
      ConfigError: the port is in use, or the run does not go with the explorer.
      capsjax.data.DataError: the data set cannot be had.
      CheckpointError: the checkpoint cannot be read.
    """
    if config.export is not None:
        # Loads first: nothing is written for a run that cannot be explored.
        page = export(_live(config), config.examples)
        config.export.write_text(page, encoding="utf-8")
        print(f"wrote {config.export}, {len(page.encode()) / 1e6:.1f} MB")
        return
    listening = _listen(config.port)
    with listening:
        app = make_app(_live(config))
        port = listening.getsockname()[1]
        print(f"exploring {config.run} at http://{_HOST}:{port} (Ctrl-C ends it)", flush=True)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        server.run(sockets=[listening])


def _live(config: ExploreConfig) -> Live:
    try:
        return Live(load_network(config.run, config.checkpoint))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"run directory {config.run} cannot be explored: {error}") from None


def _listen(port: int) -> socket.socket:
    listening = socket.socket()
    # A port that the last explorer has just left is free.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((_HOST, port))
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"--port {port} cannot be had ({error.strerror}); name another, or 0 for any"
        ) from None
    listening.listen(256)
    return listening


class _TooLarge(Exception):
    """A request has more bytes than the explorer reads."""


def make_app(live: Live) -> Starlette:
    """The explorer as an ASGI application; it serves its page and answers, and no file."""

    async def page(_: Request) -> Response:
        text = _with_values(live.about())
        return HTMLResponse(text, headers={"Content-Security-Policy": _POLICY})

    def answering(work: Callable[[bytes], Response]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            try:
                return await run_in_threadpool(work, await _body(request))
            except _TooLarge:
                error = f"a request must be at most {_LARGEST // 2**20} MB"
                return JSONResponse({"error": error}, 413, {"Connection": "close"})
            except (ValueError, TypeError, KeyError, OverflowError) as error:
                missing = isinstance(error, KeyError)
                said = f"the request lacks {error}" if missing else str(error)
                return JSONResponse({"error": said}, 400)

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
    # Pages of other sites could otherwise reach it under a name of their own.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[_HOST, "localhost"])
    return Starlette(routes=routes, middleware=[hosts])


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LARGEST:
            raise _TooLarge
    return bytes(body)


def _values(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the request must be a JSON object") from None
    if not isinstance(values, dict):
        raise ValueError("the request must be a JSON object")
    return values


def _image(live: Live, values: dict[str, Any]) -> np.ndarray:
    """The image that a request draws, or names by the numbers of test images."""
    if "test" in values:
        numbers = values["test"], values.get("other")
        if any(isinstance(n, bool) or not isinstance(n, int | None) for n in numbers):
            raise ValueError("test images are named by integers")
        return live.test_image(*numbers)
    shape = live.network.config.image_shape
    pixels = np.asarray(values["pixels"])
    if pixels.size != np.prod(shape) or pixels.dtype.kind not in "iu":
        raise ValueError(f"pixels must be {int(np.prod(shape))} integers, got {pixels.size}")
    if pixels.min() < 0 or pixels.max() > 255:
        raise ValueError("pixels must be from 0 to 255")
    return pixels.astype(np.uint8).reshape(shape)


def read_image(data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """Decodes an upload to uint8 ``[H, W, C]``; a ValueError unless it is an image of this size."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "GIF", "WEBP", "BMP"]) as image:
            # Of the header, before a small file is unpacked into many pixels.
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError(f"the image has {image.width} x {image.height} pixels, too many")
            if (image.height, image.width) != shape[:2]:
                raise ValueError(
                    f"the image must be {shape[1]} x {shape[0]} pixels, got {image.width} x"
                    f" {image.height}"
                )
            return np.asarray(image.convert("L" if shape[2] == 1 else "RGB")).reshape(shape)
    except (OSError, SyntaxError, Image.DecompressionBombError):
        raise ValueError("the upload is no PNG, JPEG, GIF, WebP or BMP image") from None


def export(live: Live, examples: tuple[int, ...]) -> str:
    """A page of chosen test images, and each of them with the next on it, that needs no server."""
    about = live.about()
    chosen: list[dict[str, Any]] = []
    pairs: list[tuple[int, int | None]] = [(n, None) for n in examples]
    pairs += [(a, b) for a, b in itertools.pairwise(examples)][:4]
    for index, other in pairs:
        image = live.test_image(index, other)
        name = f"test image {index}" + (f" and {other}" if other is not None else "")
        svgs = {theme: live.diagram(image, None, theme) for theme in ("light", "dark")}
        chosen.append({"name": name, **live.look(image), "diagram": svgs})
    about["labels"] = []
    return _with_values({**about, "examples": chosen, "decoder": live.decoder_weights()})


def _with_values(about: dict[str, Any]) -> str:
    """The page with values in it, in which nothing can end the script that holds them."""
    text = json.dumps(about).replace("<", "\\u003c")
    title = html.escape(f"Explorer: capsules on {about['dataset']}")
    page = _PAGE.read_text(encoding="utf-8")
    return page.replace("__TITLE__", title).replace("__ABOUT__", text)
