"""Google's storage, as far as its clients can tell: an emulator on the loopback address.

python tests/storage_emulator.py PORT
"""

import http.server
import sys

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects


def generation(storage, bucket, name):
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def download(request, response, storage, *args, **kwargs):
    """Also tells the object's generation, as Google's storage does and TensorStore expects."""
    names = request.params["bucket_name"], request.params["object_id"]
    response["x-goog-generation"] = generation(storage, *names)
    return original_download(request, response, storage, *args, **kwargs)


def insert(request, response, storage, *args, **kwargs):
    """Also refuses to replace a generation other than the one that the client expects."""
    expected = request.query.get("ifGenerationMatch")
    if expected and "name" in request.query:
        names = request.params["bucket_name"], request.query["name"][0]
        if generation(storage, *names) != expected[0]:
            response.status = 412
            return None
    return original_insert(request, response, storage, *args, **kwargs)


original_download, original_insert = objects.download, objects.insert
objects.download, objects.insert = download, insert
# TensorStore opens more connections at once than may wait by default.
http.server.HTTPServer.request_queue_size = 128

if __name__ == "__main__":
    from gcp_storage_emulator.server import create_server  # takes its handlers when imported

    create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="runs").run()
