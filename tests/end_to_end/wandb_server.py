"""What of a Weights & Biases server a saved view talks to, on the loopback interface."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Dashboards(ThreadingHTTPServer):
    """Takes views; ``views`` is {(entity, project): [view]}, each with its name and what is in it."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.views = {}
        self.refuses = False

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path != "/graphql":
            self.answer({})
            return
        question = json.loads(body)
        if "upsertView" not in question["query"]:
            viewer = {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
            self.answer({"data": {"viewer": viewer}})
        elif self.server.refuses:
            self.answer({"data": {"upsertView": None}, "errors": [{"message": "permission denied"}]})
        else:
            view = question["variables"]
            views = self.server.views.setdefault((view["entityName"], view["projectName"]), [])
            views.append({"name": view["displayName"], "section": json.loads(view["spec"])["section"]})
            answer = {"upsertView": {"view": {"id": str(len(views)), "name": view["name"]}, "inserted": True}}
            self.answer({"data": answer})

    def answer(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def wandb_server():
    server = Dashboards()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
