"""A real S3 store on the loopback interface."""

import threading
from contextlib import contextmanager

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server


class S3Store:
    """A real S3 API; counts requests, and asks the next ``num_slow_downs`` readers of objects to slow down."""

    def __init__(self):
        self.app = DomainDispatcherApplication(create_backend_app)
        self.requests, self.num_slow_downs = [], 0
        self.lock = threading.Lock()

    def __call__(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self.lock:
            self.requests.append((method, path))
            is_slow = method == "GET" and path.endswith(".tar") and self.num_slow_downs > 0
            self.num_slow_downs -= is_slow
        if is_slow:
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
        return self.app(environ, start_response)

    def count(self, method, name):
        with self.lock:
            return sum(m == method and path.endswith(name) for m, path in self.requests)


class _Quiet(WSGIRequestHandler):
    def log_request(self, *_):
        pass


@contextmanager
def s3_server():
    """Yield (store, url)."""
    store = S3Store()
    server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=_Quiet)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield store, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
