"""A server on loopback that speaks what kagglehub 1.0.2 and huggingface_hub 2.4.0 ask of a hub.

Learned from what they send. Hugging Face: HEAD and GET of ``/owner/name/resolve/revision/file``,
where large files are redirected to another host, and POST of ``paths-info``. Kaggle: POST of
``/api/v1/models.ModelApiService/...``, where a download is redirected to the host of a storage
that states an MD5 and honours ranges.

huggingface_hub finds it by HF_ENDPOINT. kagglehub knows no port but 80 for its own setting
KAGGLE_API_ENVIRONMENT=LOCALHOST, so the server is also the HTTP proxy that leads there.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
STORAGE = "storage.kaggle.test"
_LARGE = (".safetensors", ".model", ".h5")


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    file: str | None
    range: str | None
    authorization: str | None


@dataclass
class Model:
    """What the hub has under one name; tests change it while it is served."""

    files: dict[str, bytes]
    version: int = 3
    commit: str = COMMIT
    # HTTP status of every answer.
    status: int = 200
    error_code: str | None = None
    # By file: break the connection after so many bytes, once for each.
    cuts: dict[str, list[int]] = field(default_factory=dict)
    # By file: send so many bytes and then nothing, until `resumed` is set.
    stalls: dict[str, int] = field(default_factory=dict)
    resumed: threading.Event = field(default_factory=threading.Event)
    # By file: how many times a byte of it is sent wrong.
    wrong_bytes: dict[str, int] = field(default_factory=dict)
    # By file: what is described instead of its size.
    described_bytes: dict[str, int] = field(default_factory=dict)
    states_digests: bool = True

    @classmethod
    def of(cls, directory: Path) -> "Model":
        paths = [path for path in directory.rglob("*") if path.is_file()]
        return cls({str(path.relative_to(directory)): path.read_bytes() for path in paths})

    def size(self, name: str) -> int:
        return self.described_bytes.get(name, len(self.files[name]))


class LoopbackHubs(ThreadingHTTPServer):
    """Serves one `Model` under every name, and keeps what it was asked. Use with ``with``."""

    daemon_threads = True

    def __init__(self, model: Model) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = model
        self.requests: list[Request] = []
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def files_asked_for(self) -> list[str]:
        return [r.file for r in self.requests if r.file and r.method == "GET"]

    def __enter__(self) -> "LoopbackHubs":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nobody listens from now on."""
        if self._thread.is_alive():
            self.shutdown()
            self._thread.join()
            self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: LoopbackHubs

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        model = self.server.model
        parts = unquote(url.path).split("/")
        is_storage = STORAGE in (url.hostname or "") or parts[1] == "cdn"
        is_resolve = "resolve" in parts
        file = None
        if is_storage:
            file = "/".join(parts[2:])
        elif is_resolve:
            file = "/".join(parts[5:])
        self.server.requests.append(
            Request(
                self.command,
                self.path,
                file,
                self.headers.get("Range"),
                self.headers.get("Authorization"),
            )
        )
        if model.status != 200:
            self._answer_json(model.status, {"code": model.status, "message": "no"})
        elif is_storage:
            self._send_file(file or "")
        elif is_resolve:
            self._resolve(file or "")
        elif "paths-info" in parts:
            self._describe(parse_qs(body.decode())["paths"])
        else:
            self._kaggle(parts[-1], json.loads(body))

    # --- Hugging Face ---

    def _resolve(self, file: str) -> None:
        model = self.server.model
        if file not in model.files:
            self._answer_json(404, {}, {"X-Error-Code": "EntryNotFound"})
        elif file.endswith(_LARGE):
            # A name of this machine that is not the address of the endpoint: another host.
            location = f"http://localhost:{self.server.server_port}/cdn/{file}"
            self._answer_json(302, {}, {"Location": location, "X-Repo-Commit": model.commit})
        else:
            self._send_file(file)

    def _describe(self, names: list[str]) -> None:
        model = self.server.model
        entries = []
        for name in names:
            if name in model.files:
                content = model.files[name]
                blob = f"blob {len(content)}\0".encode() + content
                entry = {
                    "type": "file",
                    "path": name,
                    "size": model.size(name),
                    "oid": hashlib.sha1(blob).hexdigest(),
                }
                if name.endswith(_LARGE):
                    digest = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"oid": digest, "size": model.size(name), "pointerSize": 134}
                entries.append(entry)
        self._answer_json(200, entries)

    # --- Kaggle ---

    def _kaggle(self, call: str, body: dict[str, object]) -> None:
        model = self.server.model
        if call == "GetModelInstance":
            self._answer_json(200, {"versionNumber": model.version})
        elif call == "ListModelInstanceVersionFiles":
            # Three files a page, so that there are several.
            names = sorted(model.files)
            start = int(str(body.get("pageToken") or 0))
            page = [{"name": name, "size": model.size(name)} for name in names[start : start + 3]]
            token = str(start + 3) if start + 3 < len(names) else ""
            self._answer_json(200, {"files": page, "nextPageToken": token})
        elif call == "DownloadModelInstanceVersion":
            location = f"http://{STORAGE}/bucket/{body['path']}?X-Goog-Signature=signed"
            self._answer_json(302, {}, {"Location": location})
        else:
            self._answer_json(400, {"code": 400, "message": call})

    # --- both ---

    def _send_file(self, name: str) -> None:
        model = self.server.model
        content = model.files[name]
        start = 0
        if requested := self.headers.get("Range"):
            start = int(requested.removeprefix("bytes=").removesuffix("-"))
        sent = bytearray(content[start:])
        if model.wrong_bytes.get(name, 0) and self.command == "GET":
            model.wrong_bytes[name] -= 1
            sent[-1] ^= 1
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(sent)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", model.commit)
        if start:
            last, whole = len(content) - 1, len(content)
            self.send_header("Content-Range", f"bytes {start}-{last}/{whole}")
        if model.states_digests:
            md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
            self.send_header("x-goog-hash", f"crc32c=AAAAAA==,md5={md5}")
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = model.cuts.get(name)
        if name in model.stalls:
            self.wfile.write(sent[: model.stalls.pop(name)])
            model.resumed.wait()
        else:
            self.wfile.write(sent[: cuts.pop(0)] if cuts else sent)

    def _answer_json(
        self, status: int, document: object, headers: dict[str, str] | None = None
    ) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        error_code = self.server.model.error_code
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if error_code:
            self.send_header("X-Error-Code", error_code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
