"""A stand-in for a judge and for an HTTP reward, on loopback: it scores, is slow, fails and lies, as the text says."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LIES = {
    "says text": '{"score": "0.5"}',
    "says null": '{"score": null}',
    "says true": '{"score": true}',
    "says a list": '{"score": [1]}',
    "says NaN": '{"score": NaN}',
    "says too much": '{"score": 1e39}',
    "says more": '{"score": 1' + "0" * 400 + "}",
    "says nothing": "{}",
    "says 7": '{"score": 7}',
}
"""A completion -> the object with the score that is given to it, which is none."""
BODIES = {"HTML": "<html>502</html>", "a list": "[1.0]", "empty": "", "cut": '{"choices": [{"mess'}
"""A completion -> the whole answer to it."""


class JudgeServer:
    """The server; use it in a `with` statement.

    Attributes:
        url: of its HTTP reward; `url`/v1 is the judge's.
        asked: the completions of all requests, in order.
        most: requests that were in flight at once, at most.
        headers: those of the last request.
        bodies: of all requests, in order.
        slow_s: how long it takes to answer.
        retry_after: what it asks to wait where it is busy, as in the header.
    """

    def __init__(self, slow_s: float = 0.0, retry_after: str = "0") -> None:
        self.retry_after = retry_after
        self.slow_s, self.asked, self.bodies, self.headers, self.most = slow_s, [], [], {}, 0
        self._in_flight, self._lock, self._ended = 0, threading.Lock(), threading.Event()

        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                stand_in._answer(self, body)

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size, daemon_threads, block_on_close = 512, True, False

            def handle_error(self, *_):
                pass

        self._http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._http.shutdown()
        self._http.server_close()

    @contextmanager
    def _flight(self):
        with self._lock:
            self._in_flight += 1
            self.most = max(self.most, self._in_flight)
        try:
            yield
        finally:
            with self._lock:
                self._in_flight -= 1

    def _answer(self, handler, body):
        judged = "completion" not in body
        text = (
            body["messages"][-1]["content"].rpartition("<answer-")[2].split("\n")[1] if judged else body["completion"]
        )
        with self._lock:
            before = self.asked.count(text)
            self.asked.append(text)
            self.bodies.append(body)
            self.headers = dict(handler.headers)
        with self._flight():  # over before the answer is sent, after which the next call may come
            time.sleep(self.slow_s)
        word, _, rest = text.partition(" ")
        if word == "status" and not (rest.endswith(" once") and before):
            return self._send(handler, "busy " + handler.headers.get("authorization", ""), int(rest.split()[0]))
        if word == "hang":
            self._ended.wait(100)
        if word in ("hang", "close"):
            handler.close_connection = True
            return None
        if word == "drip":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n")
            while not self._ended.wait(0.05):
                handler.wfile.write(b" ")
        if text == "huge":
            return self._send(handler, "x" * (2**20 + 1))
        if text in BODIES:
            return self._send(handler, BODIES[text])
        score = LIES.get(text) or json.dumps({"reason": "as it is", "score": 1.0 if word == "status" else float(word)})
        if not judged:
            return self._send(handler, score)
        first = "" if text in LIES else 'I think {"score": 0} is too low.\n'
        message = {"role": "assistant", "content": f"{first}```json\n{score}\n```"}
        usage = {"prompt_tokens": 100, "completion_tokens": 7}
        return self._send(handler, json.dumps({"choices": [{"message": message}], "usage": usage}))

    def _send(self, handler, text, status=200):
        handler.send_response(status)
        handler.send_header("content-length", str(len(text)))
        if status == 429:
            handler.send_header("retry-after", self.retry_after)
        handler.end_headers()
        handler.wfile.write(text.encode())


class LengthJudge(JudgeServer):
    """An HTTP reward that pays for even lengths, whatever a text says."""

    def _answer(self, handler, body):
        self.asked.append(body["completion"])
        self._send(handler, json.dumps({"score": 1.0 - len(body["completion"]) % 2}))
