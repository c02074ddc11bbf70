"""A bucket on this machine: a server that speaks the part of Google Cloud Storage's JSON API that its clients use.

gcsfs (through epath), google-cloud-storage and TensorStore's own C++ client all take the address of such a server from
the environment, so what is tested are those clients themselves. As in the service, objects are written whole, there is
no append and no folder, and one object at a time is renamed; what is asked for and not known here is an error.
"""

import functools
import json
import os
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

STAMP = "2026-01-01T00:00:00.000Z"


class Bucket(BaseHTTPRequestHandler):
    """Requests on `objects`: (bucket, name) -> (content, generation)."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm, wbufsize = True, -1  # head and body at once: else each answer waits 40 ms
    objects: dict = {}
    lock = threading.Lock()
    generations = 0
    uploads: dict = {}

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def about(self, key):
        content, generation = self.objects[key]
        bucket, name = key
        return {
            "kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(content)),
            "generation": str(generation), "metageneration": "1", "updated": STAMP, "timeCreated": STAMP,
        }  # fmt: skip

    def put(self, bucket, name, content):
        with self.lock:
            generation = self.objects.get((bucket, name), (b"", 0))[1]
            if "ifGenerationMatch" in self.query and int(self.query["ifGenerationMatch"]) != generation:
                return self.answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
            Bucket.generations += 1
            self.objects[bucket, name] = (content, self.generations)
            about = self.about((bucket, name))
        self.answer(200, about)

    def list(self, bucket):
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        first, end = self.query.get("startOffset", ""), self.query.get("endOffset", "")
        items, prefixes = [], set()
        with self.lock:
            for key in sorted(self.objects):
                name = key[1]
                if key[0] != bucket or not name.startswith(prefix) or name < first or (end and name >= end):
                    continue
                head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                prefixes.add(prefix + head + found) if found else items.append(self.about(key))
        self.answer(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def get(self, key):
        with self.lock:
            found = self.objects.get(key)
        if found is None:
            return self.answer(404, {"error": {"code": 404, "message": "No such object"}})
        if self.query.get("alt") != "media":
            return self.answer(200, self.about(key))
        content, generation = found
        if self.query.get("ifGenerationNotMatch") == str(generation):
            return self.answer(304)
        headers = {"x_goog_generation": generation}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            return self.answer(200, content, **headers)
        start, stop = int(span[1]), min(int(span[2] or len(content)), len(content) - 1) + 1
        if start >= len(content):
            return self.answer(416)
        headers["content_range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self.answer(206, content[start:stop], **headers)

    def upload(self, bucket, body):
        kind = self.query["uploadType"]
        if kind == "media":
            return self.put(bucket, self.query["name"], body)
        if kind == "multipart":
            boundary = re.search('boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            about, content = (part.partition(b"\n\n")[2] for part in body.split(b"--" + boundary)[1:3])
            return self.put(bucket, json.loads(about)["name"], content.removesuffix(b"\n"))
        if "upload_id" not in self.query:
            number = str(len(self.uploads))
            self.uploads[number] = (json.loads(body)["name"], bytearray())
            host = f"http://{self.headers['Host']}{urlsplit(self.path).path}"
            return self.answer(200, Location=f"{host}?uploadType=resumable&upload_id={number}")
        name, content = self.uploads[self.query["upload_id"]]
        content += body
        if self.headers["Content-Range"].endswith("/*"):
            return self.answer(308, Range=f"bytes=0-{len(content) - 1}")
        self.put(bucket, name, bytes(content))

    def copy(self, source, target, move=False):
        """`move`: one object, at once."""
        with self.lock:
            if source not in self.objects:
                return self.answer(404)
            content, _ = self.objects.pop(source) if move else self.objects[source]
            Bucket.generations += 1
            self.objects[target] = (content, self.generations)
            about = self.about(target)
        self.answer(200, about if move else {"kind": "storage#rewriteResponse", "done": True, "resource": about})

    def delete(self, key):
        with self.lock:
            found = self.objects.pop(key, None)
        self.answer(204 if found else 404)

    def handle_request(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        path = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/([^/]+)(.*))?)?", url.path)
        if path is None:
            return self.answer(501)
        bucket, name, rest = path[2], unquote(path[3] or ""), path[4] or ""
        match self.command, path[1], name, rest:
            case "POST" | "PUT", "/upload", "", "":
                self.upload(bucket, body)
            case "GET", None, "", "" if not url.path.endswith("/o"):
                self.answer(200, {"kind": "storage#bucket", "name": bucket, "id": bucket})
            case "GET", None, "", "":
                self.list(bucket)
            case "GET", _, _, "":
                self.get((bucket, name))
            case "DELETE", None, _, "" if name:
                self.delete((bucket, name))
            case "POST", None, _, _ if to := re.fullmatch(r"/rewriteTo/b/([^/]+)/o/([^/]+)", rest):
                self.copy((bucket, name), (to[1], unquote(to[2])))
            case "POST", None, _, _ if to := re.fullmatch(r"/moveTo/o/([^/]+)", rest):
                self.copy((bucket, name), (bucket, unquote(to[1])), move=True)
            case _:
                self.answer(501)

    do_GET = do_POST = do_PUT = do_DELETE = handle_request


class Server(ThreadingHTTPServer):
    def handle_error(self, request, address):
        """gcsfs asks two questions at once and hangs up on the slower answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, address)


@functools.cache
def serve() -> dict:
    """Starts the server of this process and points every client at it; its objects. The environment keeps the address,
    which TensorStore reads once. Skips the test where the extra [gcs] is not installed.
    """
    server = Server(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    os.environ |= {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks another service which kind of bucket this is
    }
    pytest.importorskip("gcsfs")  # reads the environment when it is imported
    return Bucket.objects


def names(bucket: str) -> list[str]:
    """Of the objects of a bucket."""
    return sorted(name for place, name in Bucket.objects if place == bucket)


def put_folder(folder, address: str) -> None:
    """Copies a folder of this machine into the bucket, as `gcloud storage cp -r` does.

    Args:
      address: gs://BUCKET/NAME.
    """
    bucket, _, name = address.removeprefix("gs://").partition("/")
    for path in folder.rglob("*"):
        if path.is_file():
            Bucket.objects[bucket, f"{name}/{path.relative_to(folder)}"] = (path.read_bytes(), 1)


def get_folder(address: str, folder) -> None:
    """Copies what is in the bucket under an address to a folder of this machine."""
    bucket, _, name = address.removeprefix("gs://").partition("/")
    for (place, key), (content, _) in list(Bucket.objects.items()):
        if place == bucket and key.startswith(f"{name}/"):
            target = folder / key.removeprefix(f"{name}/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
