"""Mixed load for a server: short and long prompts, streamed and not, many at once, aborted."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from _server import HOST, Server
from _tiny_model import WORDS

THREADS = 6
# One token each, beside spaces.
SHORT, LONG = (1, 24), (300, 1500)
ANSWER = (1, 64)
REQUEST_SECONDS = 120
# How often each kind is drawn.
KINDS = {
    "short": 6,
    "long": 2,
    "short, streamed": 5,
    "long, streamed": 2,
    "several prompts": 2,
    "chat": 2,
    "aborted while it streams": 3,
    "aborted before it answers": 2,
}


class Load:
    """Threads that ask a server without a pause, until they are stopped.

    Attributes:
        sent: How many requests of each kind came to the end that was meant for them.
        failures: What went otherwise; the first few sentences.
    """

    def __init__(self, server: Server, seed: int, threads: int = THREADS) -> None:
        self.server, self.seed, self.threads = server, seed, threads
        self.sent: Counter[str] = Counter()
        self.failures: list[str] = []
        self._stop_now = threading.Event()
        self._lock = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[Load]:
        """Ask for as long as the block takes, and wait for the answers that are under way."""
        self._stop_now.clear()
        threads = [
            threading.Thread(
                target=self._work, args=(self.seed + i,), name=f"load-{i}", daemon=True
            )
            for i in range(self.threads)
        ]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            # Whoever interrupts the block stops the server next, and waits for no answer.
            self._stop_now.set()
        for thread in threads:
            thread.join()
        # Another block draws other requests.
        self.seed += self.threads

    def _work(self, seed: int) -> None:
        draw = random.Random(seed)
        while not self._stop_now.is_set():
            kind = draw.choices(list(KINDS), weights=list(KINDS.values()))[0]
            try:
                self._ask(kind, draw)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._failed(kind, repr(error))
                # A server that has gone would otherwise be asked thousands of times a second.
                self._stop_now.wait(1)
            else:
                with self._lock:
                    self.sent[kind] += 1

    def _ask(self, kind: str, draw: random.Random) -> None:
        path, payload = request(kind, draw)
        connection = http.client.HTTPConnection(HOST, self.server.port, timeout=REQUEST_SECONDS)
        try:
            connection.request(
                "POST", path, json.dumps(payload), {"Content-Type": "application/json"}
            )
            if kind == "aborted before it answers":
                time.sleep(draw.uniform(0.0, 0.2))
                return
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(f"{response.status}: {response.read(300)!r}")
            if kind == "aborted while it streams":
                for _ in range(draw.randint(1, 8)):
                    response.readline()
                return
            check(payload, response.read())
        finally:
            # Closing is what tells the server that nobody listens any more.
            connection.close()

    def _failed(self, kind: str, why: str) -> None:
        with self._lock:
            if len(self.failures) < 10:
                self.failures.append(f"a request ({kind}) failed: {why}")


def request(kind: str, draw: random.Random) -> tuple[str, dict[str, Any]]:
    """Return the path and the payload of one request, of a kind of `KINDS`."""
    payload: dict[str, Any] = {
        "model": "model",
        "max_tokens": draw.randint(*ANSWER),
        "temperature": draw.choice((0.0, 0.0, 0.7)),
        "stream": "streamed" in kind or "streams" in kind,
    }
    if "aborted" in kind:
        payload |= {"max_tokens": 512, "ignore_eos": True}
    long = kind.startswith("long") or ("aborted" in kind and draw.random() < 0.3)
    text = words(draw, LONG if long else SHORT)
    if kind == "chat":
        payload["messages"] = [{"role": "user", "content": text}]
        return "/v1/chat/completions", payload
    several = kind == "several prompts"
    payload["prompt"] = [words(draw, SHORT) for _ in range(4)] if several else text
    if draw.random() < 0.2:
        payload["logprobs"] = draw.randint(1, 5)
    return "/v1/completions", payload


def words(draw: random.Random, count: tuple[int, int]) -> str:
    """Return a text of so many words."""
    return " ".join(draw.choices(WORDS, k=draw.randint(*count)))


def check(payload: dict[str, Any], answer: bytes) -> None:
    """Raise ValueError where an answer is not whole."""
    if payload["stream"]:
        if not answer.rstrip().endswith(b"data: [DONE]"):
            raise ValueError(f"the stream ends with {answer[-80:]!r}")
        return
    choices = json.loads(answer)["choices"]
    expected = len(payload["prompt"]) if isinstance(payload.get("prompt"), list) else 1
    if len(choices) != expected or not all(choice["finish_reason"] for choice in choices):
        raise ValueError(f"{len(choices)} choices for {expected} prompts: {answer[:200]!r}")
