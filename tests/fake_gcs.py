"""A Google Cloud Storage of this machine, in memory: as much of its JSON API as gcsfs, tensorstore and orbax speak.

python tests/fake_gcs.py [BUCKET ...]     # prints its address, and serves until it is ended

Written from https://cloud.google.com/storage/docs/json_api, with generations and preconditions as told there. Point
gcsfs and google-cloud-storage at it by STORAGE_EMULATOR_HOST, and tensorstore by TENSORSTORE_GCS_HTTP_URL.
"""

import base64
import contextlib
import hashlib
import json
import re
import struct
import sys
import threading
import time
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

import google_crc32c

_OBJECT = re.compile(r"/(?:download/)?storage/v1/b/([^/]+)/o/([^/]+)")
_COPY = re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)")
_LIST = re.compile(r"/storage/v1/b/([^/]+)/o")
_BUCKET = re.compile(r"/storage/v1/b/([^/]+)")
_UPLOAD = re.compile(r"/(?:resumable/)?upload/storage/v1/b/([^/]+)/o")
_BATCH = re.compile(r"/batch(?:/storage/v1)?")


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


class Store:
    """Buckets of objects, each {"data", "generation", "updated"}; `refusing` is what all is answered with, 0: not."""

    def __init__(self, buckets: list[str]):
        self.buckets: dict[str, dict[str, dict]] = {name: {} for name in buckets}
        self.sessions: dict[str, dict] = {}
        self.lock = threading.RLock()
        self.refusing = 0
        self._generation = time.time_ns() // 1000

    def bucket(self, name: str) -> dict[str, dict]:
        if name not in self.buckets:
            raise Refusal(404, "The specified bucket does not exist.")
        return self.buckets[name]

    def find(self, bucket: str, name: str) -> dict:
        found = self.bucket(bucket).get(name)
        if found is None:
            raise Refusal(404, f"No such object: {bucket}/{name}")
        return found

    def check(self, bucket: str, name: str, query: dict[str, str]) -> None:
        """Generation 0 stands for no object."""
        have = self.bucket(bucket).get(name, {"generation": 0})["generation"]
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != have:
            raise Refusal(412, f"generation {have} does not match")
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == have:
            raise Refusal(304, "")

    def put(self, bucket: str, name: str, data: bytes, query: dict[str, str]) -> dict:
        with self.lock:
            self.check(bucket, name, query)
            self._generation += 1
            self.bucket(bucket)[name] = {"data": data, "generation": self._generation, "updated": time.time()}
            return self.describe(bucket, name)

    def describe(self, bucket: str, name: str) -> dict:
        found = self.find(bucket, name)
        updated = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(found["updated"])) + ".000Z"
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{found['generation']}",
            "bucket": bucket,
            "name": name,
            "generation": str(found["generation"]),
            "metageneration": "1",
            "etag": f"e{found['generation']}",
            "size": str(len(found["data"])),
            "md5Hash": base64.b64encode(hashlib.md5(found["data"]).digest()).decode(),
            "crc32c": base64.b64encode(struct.pack(">I", google_crc32c.value(found["data"]))).decode(),
            "updated": updated,
            "timeCreated": updated,
            "storageClass": "STANDARD",
        }

    def list(self, bucket: str, query: dict[str, str]) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        names = [name for name in sorted(self.bucket(bucket)) if name.startswith(prefix)]
        names = [name for name in names if query.get("startOffset", "") <= name]
        if "endOffset" in query:
            names = [name for name in names if name < query["endOffset"]]
        items, prefixes = [], []
        for name in names:
            inner, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if cut and prefix + inner + cut not in prefixes:
                prefixes.append(prefix + inner + cut)
            if not cut:
                items.append(self.describe(bucket, name))
        # Pages as the real one makes them, so that who reads only the first is found out.
        start, most = int(query.get("pageToken", 0)), min(int(query.get("maxResults", 50)), 50)
        page = {"kind": "storage#objects", "items": items[start : start + most], "prefixes": prefixes}
        return page | ({"nextPageToken": str(start + most)} if len(items) > start + most else {})


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    store: Store

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        try:
            with self.store.lock:
                self.send(*self.route(self.command, url.path, query, body, self.headers))
        except Refusal as refusal:
            error = {"error": {"code": refusal.status, "message": str(refusal), "errors": [{"message": str(refusal)}]}}
            self.send(refusal.status, b"" if refusal.status == 304 else json.dumps(error).encode())

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def route(self, command, path, query, body, headers) -> tuple:
        """(status, body, headers)"""
        store = self.store
        if path == "/refuse":  # no part of the API, but for tests
            store.refusing = int(query["status"])
            return 200, b"{}"
        if store.refusing:
            who = "Anonymous caller" if store.refusing == 401 else "someone@example.com"
            raise Refusal(store.refusing, f"{who} does not have storage.objects.list access to the bucket.")
        if match := _UPLOAD.fullmatch(path):
            return self.upload(command, unquote(match[1]), query, body, headers)
        if _BATCH.fullmatch(path):
            return self.batch(body, headers)
        if match := _COPY.fullmatch(path):
            source, name, bucket, target = map(unquote, match.groups())
            made = store.put(bucket, target, store.find(source, name)["data"], query)
            done = {"done": True, "resource": made, "totalBytesRewritten": made["size"], "objectSize": made["size"]}
            return 200, json.dumps(done if "rewriteTo" in path else made).encode()
        if match := _OBJECT.fullmatch(path):
            return self.object(command, *map(unquote, match.groups()), query, headers)
        if match := _LIST.fullmatch(path):
            return 200, json.dumps(store.list(unquote(match[1]), query)).encode()
        if match := _BUCKET.fullmatch(path):
            store.bucket(unquote(match[1]))
            return 200, json.dumps({"kind": "storage#bucket", "name": match[1], "id": match[1]}).encode()
        raise Refusal(501, f"the stand-in does not know {command} {path}")

    def object(self, command, bucket, name, query, headers) -> tuple:
        store = self.store
        found = store.find(bucket, name)
        store.check(bucket, name, query)
        if command == "DELETE":
            del store.bucket(bucket)[name]
            return 204, b""
        if query.get("alt") != "media":
            return 200, json.dumps(store.describe(bucket, name)).encode()
        data = found["data"]
        more = {"x-goog-generation": str(found["generation"]), "Content-Type": "application/octet-stream"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range", "")):
            start, end = int(match[1]), min(int(match[2] or len(data)) + 1, len(data))
            if start >= len(data):
                raise Refusal(416, "range")
            return 206, data[start:end], more | {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
        return 200, data, more

    def upload(self, command, bucket, query, body, headers) -> tuple:
        store, kind = self.store, query.get("uploadType")
        if "upload_id" in query:
            return self.resume(query["upload_id"], body, headers)
        if kind == "media":
            return 200, json.dumps(store.put(bucket, query["name"], body, query)).encode()
        if kind == "multipart":
            described, data = _parts(headers["Content-Type"], body)
            name = json.loads(described).get("name") or query["name"]
            return 200, json.dumps(store.put(bucket, name, data, query)).encode()
        store.bucket(bucket)
        name = query.get("name") or json.loads(body)["name"]
        session = str(len(store.sessions))
        store.sessions[session] = {"bucket": bucket, "name": name, "data": b"", "query": query}
        host = f"http://{self.headers['Host']}"
        return 200, b"", {"Location": f"{host}/upload/storage/v1/b/{quote(bucket)}/o?upload_id={session}"}

    def resume(self, number, body, headers) -> tuple:
        session = self.store.sessions[number]
        session["data"] += body
        total = headers.get("Content-Range", "*/*").rpartition("/")[2]
        if total == "*" and headers.get("Content-Range"):
            return 308, b"", {"Range": f"bytes=0-{len(session['data']) - 1}"} if session["data"] else {}
        made = self.store.put(session["bucket"], session["name"], session["data"], session["query"])
        return 200, json.dumps(made).encode()

    def batch(self, body, headers) -> tuple:
        answers = []
        for part in (
            BytesParser()
            .parsebytes(b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + body)
            .get_payload()
        ):
            command, target, _ = part.get_payload().lstrip().splitlines()[0].split(" ")
            url = urlsplit(target)
            try:
                status, *_ = self.route(command, url.path, {}, b"", {})
            except Refusal as refusal:
                status = refusal.status
            number = part.get("Content-ID", "<0>").strip("<>")
            answers.append(
                f"Content-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\n"
                f"HTTP/1.1 {status} Done\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        text = "".join(f"--batch\r\n{answer}" for answer in answers) + "--batch--"
        return 200, text.encode(), {"Content-Type": 'multipart/mixed; boundary="batch"'}

    def send(self, status, body=b"", headers=None) -> None:
        with contextlib.suppress(ConnectionError):  # gcsfs asks in two ways at once, and hangs up on the slower
            self._send(status, body, headers)

    def _send(self, status, body, headers) -> None:
        self.send_response(status)
        for key, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        """Silence."""


def _parts(content_type: str, body: bytes) -> list[bytes]:
    """The contents of a multipart/related body, as they are."""
    boundary = re.search(r"boundary=[\"']?([^\"';]+)", content_type)[1].encode()
    parts = body.split(b"--" + boundary)[1:-1]
    return [re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1].removesuffix(b"\n").removesuffix(b"\r") for part in parts]


class Server(ThreadingHTTPServer):
    """Says nothing of clients that hang up."""

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


if __name__ == "__main__":
    Handler.store = Store(sys.argv[1:])
    server = Server(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
