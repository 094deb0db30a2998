"""Times a redraw after a slider has moved: ``python scripts/benchmark_explorer.py RUN``.

Sends requests to the explorer's own application over a loopback socket, as the page does.
"""

import http.client
import json
import socket
import statistics
import sys
import threading
import time
from pathlib import Path

import uvicorn

from capsjax.training import load_network
from capsjax.viz.explorer import Server, make_app
from capsjax.viz.live import Live

ROUNDS = 200


def main() -> None:
    """Prints the median and the worst time of a redraw."""
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/benchmark_explorer.py RUN")
    live = Live(load_network(Path(sys.argv[1])))
    server = Server(uvicorn.Config(make_app(live), log_level="warning", lifespan="off"))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        connection = http.client.HTTPConnection(*listening.getsockname(), timeout=30)
        pose = live.look(live.test_image(0))["poses"][0]
        for name, body in (("decode", {"pose": pose, "class": 0}), ("look", {"test": 0})):
            times = []
            for n in range(ROUNDS):
                if name == "decode":
                    body["pose"][n % len(pose)] += 0.001
                start = time.perf_counter()
                connection.request("POST", f"/api/{name}", json.dumps(body))
                connection.getresponse().read()
                times.append(1000 * (time.perf_counter() - start))
            print(
                f"{name}: median {statistics.median(times):.1f} ms, worst {max(times):.1f} ms"
                f" of {ROUNDS}"
            )
        connection.close()
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
