"""``megagpt serve``: OpenAI's API over real sockets; many requests at once, bad ones, keys and limits."""

import asyncio
import json

import pytest
import torch

pytest.importorskip("starlette", reason="starlette is not installed (extra serve)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra serve)")

from serve_common import CONTEXT, KEY, ask, post_head, serving_run, write_run

from megagpt.errors import ConfigError
from megagpt.serve import guard
from megagpt.serve.main import ServeSettings, model_name, open_to_others


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def server(run):
    with serving_run(run) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai", reason="the openai client is not installed (extra dev)")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def is_decided(server, completion):
    """Whether each token is the likeliest by more than what rounding can change."""
    ids = completion.tokens.ids[: CONTEXT + 1]
    with torch.no_grad():
        best = server.model(torch.tensor([ids[:-1]]))[0, completion.tokens.n_prompt - 1 :].topk(2).values
    return bool((best[:, 0] - best[:, 1] > 1e-3).all())


def test_two_hundred_requests_at_once_get_each_its_own_answer(server):
    """Half of them as streams, of different lengths, all through eight rows; greedy, so each is known beforehand."""
    openai = pytest.importorskip("openai", reason="the openai client is not installed (extra dev)")
    wanted, expected = {}, []
    for i in range(400):
        prompt, options = f"{i * 7919 % 1000} is request {i}"[: 5 + i % 17], {"max_tokens": 5 + i % 23}
        alone = server.alone(prompt, **options)
        if prompt in wanted or not is_decided(server, alone):
            continue
        if i % 3 == 0:
            options["stop"] = [alone.text[-2:]]
            alone = server.alone(prompt, **options)
        wanted[prompt] = options
        expected.append((alone.text, alone.finished, len(alone.tokens.new)))
        if len(wanted) == 200:
            break
    assert len(wanted) == 200
    assert len({text for text, _, _ in expected}) > 150  # so that a mix-up shows

    async def answer(client, i, prompt):
        options = {"model": "tiny", "prompt": prompt, "temperature": 0, **wanted[prompt]}
        if i % 2:
            found = await client.completions.create(**options)
            return found.choices[0].text, found.choices[0].finish_reason, found.usage.completion_tokens
        stream = await client.completions.create(**options, stream=True, stream_options={"include_usage": True})
        *pieces, last = [piece async for piece in stream]
        text = "".join(piece.choices[0].text for piece in pieces)
        return text, pieces[-1].choices[0].finish_reason, last.usage.completion_tokens

    async def all_at_once():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            return await asyncio.gather(*(answer(client, i, prompt) for i, prompt in enumerate(wanted)))

    answers = asyncio.run(all_at_once())
    assert answers == expected
    assert server.load == (0, 0)


def test_the_openai_client_reads_models_and_every_kind_of_answer(server, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "megagpt"

    def texts(**options):
        return [choice.text for choice in client.completions.create(model="tiny", max_tokens=12, **options).choices]

    alone = server.alone("It was", 12).text
    assert texts(prompt="It was", temperature=0, echo=True) == [f"It was{alone}"]
    assert texts(prompt=server.tokenizer.encode("It was"), temperature=0) == [alone]
    both = texts(prompt=["It was", "a dark"], temperature=0, n=2)
    assert both == [alone, alone, *[server.alone("a dark", 12).text] * 2]
    stop = alone[3:5]
    assert texts(prompt="It was", temperature=0, stop=stop) == [alone[: alone.index(stop)]]

    drawn = texts(prompt="It was", seed=5, n=3)
    assert drawn == texts(prompt="It was", seed=5, n=3)
    assert drawn[1:] == texts(prompt="It was", seed=6, n=2)
    assert len(set(drawn)) == 3
    assert texts(prompt="It was") != texts(prompt="It was")  # without a seed each draws anew
    assert texts(prompt="It was", seed=5, extra_body={"top_k": 1}) == [alone]
    assert texts(prompt="") != [""]  # a new document begins
    usage = client.completions.create(model="tiny", prompt=["ab", "abc"], n=2, max_tokens=4, temperature=0).usage
    assert usage.prompt_tokens == 5
    assert usage.total_tokens == 5 + usage.completion_tokens


BAD = {
    "no JSON": (b'{"prompt": "x"', None),
    "not UTF-8": (b'{"prompt": "\xff"}', None),
    "no object": (b"[1, 2]", None),
    "nan": (b'{"temperature": NaN}', None),
    "deep": (b"[" * 100_000, None),
    "many digits": (b'{"seed": ' + b"9" * 10_000 + b"}", None),
    "unknown field": ({"promt": "x"}, "promt"),
    "prompt of a number": ({"prompt": 5}, "prompt"),
    "prompt of nothing": ({"prompt": []}, "prompt"),
    "prompt of kinds": ({"prompt": ["x", 3]}, "prompt"),
    "half a character": (b'{"prompt": "\\ud800"}', "prompt"),
    "strange token": ({"prompt": [257]}, "prompt"),
    "long prompt": ({"prompt": "x" * (CONTEXT + 1)}, "prompt"),
    "no tokens": ({"max_tokens": 0}, "max_tokens"),
    "many tokens": ({"max_tokens": 10**9}, "max_tokens"),
    "half a token": ({"max_tokens": 1.5}, "max_tokens"),
    "negative temperature": ({"temperature": -1}, "temperature"),
    "huge temperature": (b'{"temperature": 1' + b"0" * 400 + b"}", "temperature"),
    "temperature in words": ({"temperature": "hot"}, "temperature"),
    "top_p": ({"top_p": 1.5}, "top_p"),
    "top_k": ({"top_k": -1}, "top_k"),
    "rule": ({"top_p_rule": "x"}, "top_p_rule"),
    "penalty": ({"repetition_penalty": 1e-30}, "repetition_penalty"),
    "seed": ({"seed": -1}, "seed"),
    "stops": ({"stop": ["a"] * 5}, "stop"),
    "empty stop": ({"stop": [""]}, "stop"),
    "many answers": ({"n": 1000}, "n"),
    "more than there is room for": ({"prompt": ["x"] * 100, "n": 100}, "n"),
    "best_of": ({"best_of": 3}, "best_of"),
    "logprobs": ({"logprobs": 2}, "logprobs"),
    "stream": ({"stream": "yes"}, "stream"),
    "stream_options": ({"stream": True, "stream_options": 1}, "stream_options"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_request_that_says_something_wrong_gets_status_400_and_the_field(server, name):
    body, param = BAD[name]
    status, answer, _ = ask(server, body)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] == param
    assert answer["error"]["message"].isprintable()


def test_what_is_not_there_or_not_allowed_has_its_own_status(server):
    def status(body, **options):
        found, answer, headers = ask(server, body, **options)
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        return found, answer["error"]["code"], headers

    assert status({"model": "gpt-5"})[:2] == (404, "model_not_found")
    assert status(None, method="GET", path="/v1/models/gpt-5")[:2] == (404, "model_not_found")
    assert status(None, method="GET", path="/v1/embeddings")[0] == 404
    assert "there are /v1/completions" in ask(server, {}, path="/v1/chat/completions")[1]["error"]["message"]
    found, _, headers = status(None, method="GET")
    assert (found, headers["Allow"]) == (405, "POST")
    assert status({"prompt": "x"}, Content_Type="text/plain")[0] == 415  # what any page may send without being asked
    assert status({"prompt": "x"}, Host="evil.example")[0] == 403  # a stranger's name for 127.0.0.1
    assert ask(server, {"max_tokens": 1}, Host=f"localhost:{server.port}")[0] == 200
    assert ask(server, None, method="GET", path="/health")[:2] == (200, {"status": "ok"})


def test_a_body_that_is_too_long_is_refused_before_it_is_read(run):
    with serving_run(run, body_bytes=1000) as server:
        assert ask(server, {"prompt": "x" * 1000})[0] == 413
        with server.connect() as connection:  # a length is not always given
            head = post_head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
            connection.sendall(head + b"3e9\r\n" + b" " * 1001 + b"\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
        with server.connect() as connection:
            connection.sendall(post_head(10**12))
            assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
        assert ask(server, {"prompt": "x", "max_tokens": 1})[0] == 200


def test_a_key_is_asked_for_and_a_wrong_one_refused(run, tmp_path):
    openai = pytest.importorskip("openai", reason="the openai client is not installed (extra dev)")
    (tmp_path / "key").write_text(f"{KEY}\n")
    with serving_run(run, key=guard.read_key(str(tmp_path / "key"), {})) as server:
        for path, body in (("/v1/completions", {"prompt": "x"}), ("/v1/models", None), ("/v1/models/tiny", None)):
            method = "POST" if body else "GET"
            for given in ({}, {"Authorization": f"Bearer {KEY}0"}, {"Authorization": f"Basic {KEY}"}):
                status, answer, headers = ask(server, body, method=method, path=path, **given)
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
                assert headers["WWW-Authenticate"] == "Bearer"
                assert KEY not in json.dumps(answer)
            assert ask(server, body, method=method, path=path, Authorization=f"Bearer {KEY}")[0] == 200
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError, match="the API key is wrong"),
        ):
            client.completions.create(model="tiny", prompt="x")


@pytest.mark.parametrize("content", ["", " \n", "two words", "sch\u00f6n", "a\x00b"], ids=lambda text: repr(text))
def test_a_file_without_a_key_is_refused_without_showing_it(tmp_path, content):
    (tmp_path / "key").write_text(content)
    with pytest.raises(ConfigError) as refused:
        guard.read_key(str(tmp_path / "key"), {})
    assert not content.strip() or content not in str(refused.value)


def test_the_key_comes_from_a_file_before_the_variable(tmp_path):
    (tmp_path / "key").write_text(KEY)
    assert guard.read_key(None, {}) is None
    assert guard.read_key(None, {guard.VARIABLE: KEY}) == guard.read_key(str(tmp_path / "key"), {guard.VARIABLE: "x"})
    with pytest.raises(ConfigError, match="No such file"):
        guard.read_key(str(tmp_path / "none"), {guard.VARIABLE: KEY})


def test_a_model_is_called_as_its_folder_whatever_of_it_is_named(run, monkeypatch):
    """A file gave them all the name model.safetensors."""
    monkeypatch.chdir(run)
    assert {model_name(name) for name in (".", str(run), "model.safetensors")} == {run.name}


def test_a_port_that_is_none_is_refused():
    """99999 was served at 34463, its last 16 bits."""
    with pytest.raises(ConfigError, match="--port 99999 must be at most 65535"):
        ServeSettings(from_="run", port=99999)


@pytest.mark.parametrize(
    ("address", "key", "warns"),
    [
        ("127.0.0.1", None, False),
        ("::1", None, False),
        ("0.0.0.0", None, True),
        ("::", None, True),
        ("0.0.0.0", b"", False),
    ],
)
def test_whoever_lets_others_in_without_a_key_is_warned(address, key, warns):
    assert bool(open_to_others(address, 8000, key)) == warns
