"""A server of a tiny random model in this process, on a port of 127.0.0.1 of its own."""

import contextlib
import http.client
import json
import socket
import threading
import time
from dataclasses import dataclass

import torch
from safetensors.torch import save_file
from test_evaluate_generate import byte_tokenizer

from megagpt.evaluate.source import open_source
from megagpt.evaluate.text import Completion, complete
from megagpt.model.config import GPTConfig
from megagpt.model.generate import Generation, Text
from megagpt.model.gpt import GPT
from megagpt.model.sampling import Sampling
from megagpt.ops import load_ops
from megagpt.serve import server as serving
from megagpt.serve.app import Service, build_app
from megagpt.serve.request import Limits
from megagpt.serve.worker import Worker

CONTEXT = 64
_PRINTABLE = 94  # tokens, the first ones: from ! to ~
GREEDY = Sampling(temperature=0)
KEY = "a-key-of-the-tests-0123456789"


def write_run(folder):
    """The run folder of a random model. Its likeliest tokens are letters, and never the one that ends a text."""
    config = GPTConfig(vocab_size=257, seq_len=CONTEXT, n_layer=2, n_head=2, d_model=32)
    torch.manual_seed(3)
    model = GPT(config, load_ops("torch", head_width=16, dtype=torch.float32, device="cpu"))
    weights = {n: x.detach() * (1 if "ln_" in n else 12) for n, x in model.state_dict().items()}
    weights["wte.weight"][_PRINTABLE:] = 0
    save_file(weights, folder / "model.safetensors", metadata={"config": json.dumps(config.to_dict())})
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    return folder


@dataclass
class Running:
    """A server that runs in a thread."""

    port: int
    worker: Worker
    model: torch.nn.Module
    tokenizer: object
    server: serving.Server

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def load(self):
        """How many texts are being generated, and how many wait."""
        with self.worker._changed:
            return len(self.worker._running), len(self.worker._waiting)

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def alone(self, prompt, max_tokens, stop=()):
        """The greedy answer to ``prompt``, generated with nothing beside it; a Completion."""
        text = Text(
            self.tokenizer.encode(prompt),
            max_new_tokens=max_tokens,
            sampling=GREEDY,
            stop_ids=[self.tokenizer.eot_id],
        )
        completion = Completion(self.tokenizer, text, stop)
        for _ in complete(Generation(self.model, vocab_size=257), [completion]):
            pass
        return completion

    def wait_until_idle(self, seconds=20):
        """Nothing is generated and nothing waits, before so many seconds have passed."""
        end = time.monotonic() + seconds
        while self.load != (0, 0):
            assert time.monotonic() < end, f"still {self.load} texts"
            time.sleep(0.01)


@contextlib.contextmanager
def serving_run(folder, *, rows=8, limit=256, grace=5, **options):
    """A :class:`Running` server of the run in ``folder``; ``options`` are those of ``Service``."""
    source = open_source(folder)
    model = source.build("cpu")
    worker = Worker(Generation(model, max_texts=rows, vocab_size=257), limit)
    limits = Limits(prompt_tokens=CONTEXT, max_tokens=100_000, texts=limit)
    service = Service("tiny", source.tokenizer, worker, limits, **options)
    with serving.bind("127.0.0.1", 0) as bound:
        bound.listen(serving.BACKLOG)
        server = serving.make_server(
            build_app(service), most_connections=600, grace=grace, give_up=lambda: worker.close(0)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            yield Running(bound.getsockname()[1], worker, model, source.tokenizer, server)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def post_head(length, *more):
    """The head of a POST request of a body of ``length`` bytes."""
    lines = ["POST /v1/completions HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {length}", *more, "", ""]).encode()


def post(**body):
    """A whole request to ``/v1/completions``."""
    content = json.dumps(body).encode()
    return post_head(len(content)) + content


def ask(server, body, *, method="POST", path="/v1/completions", **headers):
    """Status, JSON and headers of the answer to one request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, content, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()), answer.headers
    finally:
        connection.close()
