"""A real web server on the loopback interface that can be told to fail."""

import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FaultyServer(ThreadingHTTPServer):
    """Serves a folder, and fails as ``faults`` says: {name: [what the next GETs of it get, ...]}.

    ``("cut", n)`` ends the connection after n bytes, ``("short", n)`` ends a response without a length there, as if
    that were all; ``("stall", seconds)`` falls silent in the middle; ``("status", code)`` answers with an error;
    ``("replace", etag)`` answers, and has another file of the same size from then on.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults, self.etags = {}, {}
        self.knows_ranges = True
        self.requests = []
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def count(self, method="GET", name=".tar"):
        with self.lock:
            return sum(m == method and n.endswith(name) for m, n in self.requests)

    def names(self, method="GET"):
        """Of the tars, in the order in which they were first asked for."""
        with self.lock:
            return list(dict.fromkeys(n for m, n in self.requests if m == method and n.endswith(".tar")))

    def handle_error(self, request, client_address):
        """A client that has gone away is what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._serve(body=False)

    def do_GET(self):
        self._serve(body=True)

    def _serve(self, *, body):
        server, name = self.server, self.path.lstrip("/").partition("?")[0]
        with server.lock:
            server.requests.append((self.command, name))
            faults = server.faults.get(name, [])
            kind, value = faults.pop(0) if body and faults else ("", 0)
        path = server.folder / name
        if kind == "status" or not path.is_file():
            self.send_response(value if kind == "status" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(wanted[1]), int(wanted[2]) + 1) if wanted and server.knows_ranges else (0, len(data))
        self.send_response(206 if wanted and server.knows_ranges else 200)
        self.send_header("ETag", server.etags.get(name, f'"{len(data)}-{path.stat().st_mtime_ns}"'))
        if kind == "short":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(min(end, len(data)) - start))
        self.end_headers()
        if not body:
            return
        part = data[start:end]
        if kind in ("cut", "short"):
            self.wfile.write(part[:value])
            self.close_connection = True
            self.wfile.flush()
        elif kind == "stall":
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            time.sleep(value)
            self.close_connection = True
        else:
            self.wfile.write(part)
            if kind == "replace":
                server.etags[name] = value


@contextmanager
def http_server(folder):
    server = FaultyServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
