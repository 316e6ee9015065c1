"""What of the Hugging Face hub an upload talks to, on the loopback interface."""

import base64
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """Takes repositories and commits of small files; ``repos`` is {name: (private, {path: content})}."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos = {}
        self.refuses = False

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.refuses:
            self.answer(403, {"error": "no write access"})
        elif self.path == "/api/repos/create":
            question = json.loads(body)
            name = f"{question['organization']}/{question['name']}"
            self.server.repos[name] = (question.get("visibility") == "private" or bool(question.get("private")), {})
            self.answer(200, {"url": f"{self.server.url}/{name}"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        else:
            name = re.fullmatch(r"/api/models/(.*)/commit/main", self.path)[1]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.repos[name][1][line["value"]["path"]] = content
            self.answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/0", "commitOid": "0", "success": True})

    def do_GET(self):
        self.answer(200, {"siblings": [], "sha": "0", "id": "x/y"})

    def answer(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def hub_server():
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
