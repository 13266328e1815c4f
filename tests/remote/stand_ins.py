"""Object stores on this machine: moto for s3://, gcp-storage-emulator for gs://.

The emulator lacks what TensorStore's gs driver asks of a store (version 2026.7.19): it names no generation of what is
read, so TensorStore ends with "Malformed StorageGeneration", and takes no preconditions. Both are added here. And what
gcsfs uploads in parts it reads as an e-mail, which changes bytes: here they stay.
"""

import http.server
import json
import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

BUCKET = "bucket"


@contextmanager
def s3() -> Iterator[Mapping[str, str]]:
    """Serves s3://bucket. Yields the environment by which clients find it."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line a request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"}
    boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys).create_bucket(Bucket=BUCKET)
    try:
        yield {"AWS_ENDPOINT_URL": url, "AWS_REGION": "us-east-1"} | {name.upper(): key for name, key in keys.items()}
    finally:
        server.stop()


@contextmanager
def gs() -> Iterator[Mapping[str, str]]:
    """Serves gs://bucket. Yields the environment by which clients find it."""
    from gcp_storage_emulator import server as emulator
    from gcp_storage_emulator.handlers import objects

    generations = {
        objects.get: _reads(objects.get),
        objects.download: _reads(objects.download),
        objects.insert: _writes(objects.insert),
    }
    emulator.HANDLERS = tuple(
        (path, {method: generations.get(handler, handler) for method, handler in handlers.items()})
        for path, handlers in emulator.HANDLERS
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    emulator._read_data = _reads_parts(emulator._read_data, emulator._read_raw_data)
    http.server.HTTPServer.request_queue_size = 128  # TensorStore opens many connections at once; one refused waits 1 s
    http.server.HTTPServer.handle_error = lambda *_: None  # a client that hangs up before it has all of an answer
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    try:
        url = f"http://127.0.0.1:{port}"
        # Else gcsfs asks Google, time and again, of which type the bucket is.
        plain = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        yield plain | {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}
    finally:
        server.stop()


Handler = Callable[[Any, Any, Any], None]


def _reads(handler: Handler) -> Handler:
    def read(request: Any, response: Any, storage: Any) -> None:
        now = _generation(storage, request.params["bucket_name"], request.params["object_id"])
        if now is not None:
            response["x-goog-generation"] = now
            if request.query.get("ifGenerationNotMatch") == [now]:
                response.status = HTTPStatus.NOT_MODIFIED
                return
        handler(request, response, storage)

    return read


def _writes(handler: Handler) -> Handler:
    def write(request: Any, response: Any, storage: Any) -> None:
        wanted = request.query.get("ifGenerationMatch")
        if wanted and "name" in request.query:
            now = _generation(storage, request.params["bucket_name"], request.query["name"][0])
            if wanted != [now or "0"]:
                response.status = HTTPStatus.PRECONDITION_FAILED
                return
        handler(request, response, storage)

    return write


def _reads_parts(read_data: Callable[[Any, Any], Any], read_raw: Callable[[Any], bytes]) -> Callable[[Any, Any], Any]:
    def read(handler: Any, query: Any) -> Any:
        kind, _, boundary = handler.headers.get("Content-Type", "").partition("boundary=")
        if not kind.startswith("multipart/related"):
            return read_data(handler, query)
        line = b"\n--" + boundary.strip("\"' ").encode()
        parts = (b"\n" + read_raw(handler)).split(line)[1:-1]
        (_, meta), (header, content) = (part.split(b"\n\n", 1) for part in parts)
        return {
            "meta": json.loads(meta),
            "content": content,
            "content-type": header.partition(b"Content-Type:")[2].strip().decode(),
        }

    return read


def _generation(storage: Any, bucket: str, name: str) -> str | None:
    from gcp_storage_emulator.exceptions import NotFound

    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return None
