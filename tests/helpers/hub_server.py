"""A server on loopback that speaks what of the hub's protocol an upload and a download need."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0" * 40


class Hub:
    """A hub that knows one token, and keeps what is pushed.

    Attributes:
        files: content by repository and name.
        private: whether each repository is.
        asked: method and path of every request.
        refuse: status with which it answers every request that would write; None takes it.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.asked: list[str] = []
        self.refuse: int | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _write(self, path: str, authorised: bool, body: bytes) -> tuple[int, Any]:
        """The answer to a POST: its status and JSON."""
        if not authorised:
            return 401, {"error": "Invalid username or password."}
        if self.refuse is not None:
            return self.refuse, {"error": "no"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in self.files:
                return 409, {"url": f"{self.endpoint}/{name}"}
            self.files[name] = {}
            self.private[name] = asked.get("private") or asked.get("visibility") == "private"
            return 200, {"url": f"{self.endpoint}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        repository = "/".join(path.split("/")[3:5])
        if path.endswith("/preupload/main"):
            wanted = json.loads(body)["files"]
            return 200, {
                "files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in wanted]
            }
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[repository][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"commitUrl": f"{self.endpoint}/{repository}/commit/{COMMIT}", "commitOid": COMMIT}
        return 404, {"error": path}

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length) if length else self._chunked()
                authorised = self.headers.get("Authorization") == f"Bearer {hub.token}"
                hub.asked.append(f"POST {self.path}")
                status, answer = hub._write(self.path.partition("?")[0], authorised, body)
                self._answer(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

            def do_GET(self) -> None:
                self._read()

            def do_HEAD(self) -> None:
                self._read()

            def _read(self) -> None:
                hub.asked.append(f"{self.command} {self.path}")
                path = self.path.partition("?")[0]
                repository, _, name = path.strip("/").partition("/resolve/main/")
                content = hub.files.get(repository, {}).get(name)
                if content is not None:
                    etag = hashlib.sha256(content).hexdigest()
                    self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
                elif path.startswith("/api/models/") and "/".join(path.split("/")[3:5]) in hub.files:
                    siblings = [{"rfilename": n} for n in hub.files["/".join(path.split("/")[3:5])]]
                    about = {"id": "/".join(path.split("/")[3:5]), "sha": COMMIT, "siblings": siblings}
                    self._answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"})
                else:
                    self._answer(
                        404, b"{}", {"X-Error-Code": "EntryNotFound" if repository in hub.files else "RepoNotFound"}
                    )

            def _chunked(self) -> bytes:
                body = b""
                if self.headers.get("Transfer-Encoding") == "chunked":
                    while size := int(self.rfile.readline().strip(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                return body

            def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler
