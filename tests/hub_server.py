"""A server of the hub's protocol, as far as `datasets` needs it to stream.

As on the hub, old commits stay, so that who has resolved one goes on with it; the content of all
but small texts comes from a second address; and what one may not read does not seem to exist.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, quote, unquote, urlsplit

TOKEN = "hf_of_a_member"
_PATHS = re.compile(
    r"/api/datasets/(?P<of_api>[^/]+/[^/]+)(/(?P<what>revision|tree)/(?P<at>[^/]+)(/(?P<under>.+))?)?"
    r"|/(?P<of>datasets|storage)/(?P<of_file>[^/]+(/[^/]+)?)/resolve/(?P<commit>[^/]+)/(?P<file>.+)"
)


class Hub(ThreadingHTTPServer):
    """Data sets at `url`, until the `with` ends.

    private, gated  names that only the holder of TOKEN may read
    fault           called before content is sent, with its file and the bytes [start, end) of it;
                    returns a status to answer instead, "drop" to hang up after half, or None
    sent            [file, start, end] of each content sent
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.fault: Callable[[str, int, int], int | str | None] = lambda file, start, end: None
        self.sent: list[tuple[str, int, int]] = []
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        super().__exit__(*exception)

    def push(self, name: str, files: dict[str, bytes]) -> None:
        """Make a commit of the data set `name` in which these are all files."""
        commits = self.commits.setdefault(name, {})
        commits[hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()] = files


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        hub, url = self.server, urlsplit(self.path)
        found = _PATHS.fullmatch(unquote(url.path))
        if found is None:
            return self._send(404)
        name = found["of_api"] or found["of_file"]
        shown = self.headers.get("Authorization")
        known = found["of"] == "storage" or shown == f"Bearer {TOKEN}"
        if shown and not known:
            return self._send(
                401, {"X-Error-Message": "Invalid credentials in Authorization header"}
            )
        if name not in hub.commits or (name in hub.private and not known):
            return self._send(401, {"X-Error-Code": "RepoNotFound"})
        at = found["at"] or found["commit"] or "main"
        commit = list(hub.commits[name])[-1] if at == "main" else at
        files, missing = hub.commits[name][commit], {"X-Error-Code": "EntryNotFound"}
        if found["what"] == "tree":
            rows = _tree(files, found["under"], parse_qs(url.query)["recursive"] == ["true"])
            return self._json(rows) if rows else self._send(404, missing)
        if found["of_api"]:
            return self._json({"id": name, "sha": commit})
        if found["file"] not in files:
            return self._send(404, {**missing, "X-Repo-Commit": commit})
        if name in hub.gated and not known:
            return self._send(401, {"X-Error-Code": "GatedRepo"})
        self._file(found, commit, files[found["file"]])

    do_HEAD = do_GET

    def _file(self, found: re.Match[str], commit: str, content: bytes) -> None:
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(content)}"'}
        if found["of"] == "datasets" and not found["file"].endswith((".md", ".yaml")):
            to = f"/storage/{found['of_file']}/resolve/{commit}/{quote(found['file'])}"
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(content))}
            return self._send(302, {**headers, "Location": self.server.url + to})
        start, end = 0, len(content)
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(asked[1]), min(int(asked[2] or end) + 1, end)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        fault = self.command == "GET" and self.server.fault(found["file"], start, end)
        if isinstance(fault, int) and fault:
            return self._send(fault, {"Retry-After": "0"})
        if self.command == "GET":
            self.server.sent.append((found["file"], start, end))
        self._send(206 if asked else 200, headers, content[start:end], fault == "drop")

    def _json(self, value: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(
        self, status: int, headers: Mapping[str, str] = {}, body: bytes = b"", drop: bool = False
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if drop else body)
        self.close_connection |= drop

    def log_message(self, format: str, *args: object) -> None:
        pass


def _tree(files: dict[str, bytes], under: str | None, deep: bool) -> list[dict[str, object]]:
    parents = {str(folder) for path in files for folder in PurePosixPath(path).parents} - {"."}
    rows: dict[str, dict[str, object]] = {
        folder: {"type": "directory", "path": folder, "oid": _oid(folder.encode())}
        for folder in parents
    }
    for path, content in files.items():
        rows[path] = {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
    prefix = f"{under}/" if under else ""
    inside = [path for path in sorted(rows) if path.startswith(prefix)]
    return [rows[path] for path in inside if deep or "/" not in path.removeprefix(prefix)]


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
