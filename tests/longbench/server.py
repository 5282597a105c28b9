"""A small server with OpenAI's interface, which fails as real ones do."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Answers with `reply(body) -> str`; `faults` are taken one a request before that: an HTTP status, "drop" (the
    connection closes), "half" (it closes within the answer), "hang" (no answer), "junk" (no JSON).

    Attributes:
        bodies: of all requests that were answered, with the path as `path`.
        hits: requests in all.
    """

    def __init__(self, reply=lambda body: "Oslo", faults=(), headers=(), delay=0.0, token_ids=None):
        self.reply, self.faults, self.headers, self.delay = reply, list(faults), headers, delay
        self.token_ids = token_ids
        self.bodies, self.hits, self._lock = [], 0, threading.Lock()

    def next_fault(self):
        with self._lock:
            self.hits += 1
            return self.faults.pop(0) if self.faults else None


@contextlib.contextmanager
def serving(**settings):
    """Yields (URL, Server) of a server in a thread."""
    server = Server(**settings)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def send(self, content, status=200, cut=None, headers=()):
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw[:cut])

        def do_GET(self):
            self.send({"data": [{"id": "served-model"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fault = server.next_fault()
            if fault == "drop":
                self.close_connection = True
                self.connection.close()
            elif fault == "half":
                self.close_connection = True
                self.send({"choices": [{"text": "lost"}]}, cut=10)
            elif fault == "hang":
                time.sleep(1.5)
                self.close_connection = True
            elif fault == "junk":
                self.send(b"<html>starting</html>")
            elif fault is not None:
                self.send({"error": {"message": f"fault {fault}"}}, fault, headers=server.headers)
            else:
                time.sleep(server.delay)
                text = server.reply(body)
                with server._lock:
                    server.bodies.append({**body, "path": self.path, "key": self.headers["Authorization"]})
                choice = {"message": {"content": text}} if self.path.endswith("/chat/completions") else {"text": text}
                if server.token_ids is not None:
                    choice["token_ids"] = server.token_ids
                self.send({"choices": [choice]})

        def handle(self):
            with contextlib.suppress(OSError, ValueError):
                super().handle()

    class Listener(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128  # of the default 5, connections of a busy machine are reset

    httpd = Listener(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_address[1]}/v1", server
    finally:
        httpd.shutdown()
        httpd.server_close()
