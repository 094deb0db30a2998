"""Serves an exported network: python serve.py FOLDER PORT; POST an image to predict its class."""

import http.server
import io
import sys

import numpy as np
from PIL import Image, ImageOps

sys.path.insert(0, sys.argv[1])
from load import about, predict

_, rows, columns, channels = about["images"]["shape"]


class Handler(http.server.BaseHTTPRequestHandler):
    """Responds to an image with its class and the score."""

    def do_POST(self):
        """Predicts the image in the body."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(body)))
        image = image.convert("L" if channels == 1 else "RGB")
        pixels = np.asarray(ImageOps.fit(image, (columns, rows), Image.Resampling.BILINEAR))
        images = pixels.reshape(1, rows, columns, channels)
        scores = np.asarray(predict(images)["scores"])[0]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"{about['classes'][scores.argmax()]} {scores.max():.4f}\n".encode())


server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
print(f"http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
