"""An OpenAI-compatible endpoint on the loopback."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Answers from a list, then with ``default``: texts, or numbers for errors with that status.

    Attributes:
        requests: The requests that came in.
        keys: The API key of each request.
        seconds: How many seconds an answer takes.
        most_at_once: The largest number of requests that were open at the same time.
    """

    def __init__(self, default: str):
        self.default = default
        self.answers: list[str | int] = []
        self.requests: list[dict] = []
        self.keys: list[str | None] = []
        self.seconds = 0.0
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                with server._lock:
                    server._at_once += 1
                    server.most_at_once = max(server.most_at_once, server._at_once)
                    server.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                    server.keys.append(self.headers["Authorization"])
                    answer = server.answers.pop(0) if server.answers else server.default
                time.sleep(server.seconds)
                if isinstance(answer, int):
                    status, body = answer, {"error": {"message": "no"}}
                else:
                    message = {"role": "assistant", "content": answer}
                    choice = {"index": 0, "finish_reason": "stop", "message": message}
                    head = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
                    status, body = 200, {**head, "choices": [choice]}
                data = json.dumps(body).encode()
                with server._lock:
                    server._at_once -= 1
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("retry-after-ms", "5")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()
