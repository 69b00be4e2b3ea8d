"""A local web server that fails on request, random tars, and the files of a cache, for tests of shards."""

import os
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from made_shards import tar_bytes

from lib.data.fetcher import Fetcher


class Server:
    """A local web server that counts requests and fails on request."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.failures: Counter[str] = Counter()
        """requests for a path that fail before one succeeds"""
        self.short: Counter[str] = Counter()
        """answers for a path that end too early"""
        self.requests: Counter[str] = Counter()
        self.absent = 404
        self.seconds = 0.0
        self.drip = 0.0
        """seconds before each byte of an answer's body, at most 200 bytes"""
        self.headers: dict[str, str] = {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):  # noqa: N802
                server.requests[self.path] += 1
                time.sleep(server.seconds)
                content = server.files.get(self.path.partition("?")[0])
                if server.failures[self.path] > 0:
                    server.failures[self.path] -= 1
                    return self.send_error(503)
                if content is None:
                    return self.send_error(server.absent)
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                for name, value in server.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if server.short[self.path] > 0:
                    server.short[self.path] -= 1
                    content = content[: len(content) // 2]
                for place in range(min(len(content), 200) if server.drip else 0):
                    time.sleep(server.drip)
                    self.wfile.write(content[place : place + 1])
                if not server.drip:
                    self.wfile.write(content)

            def log_message(self, *_):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


def random_tar(members: int = 3, size: int = 2000) -> bytes:
    return tar_bytes({f"{number}.txt": os.urandom(size) for number in range(members)})


def cached(fetcher: Fetcher) -> list[str]:
    folder = fetcher.cache / "shards"
    return sorted(os.listdir(folder)) if folder.exists() else []
