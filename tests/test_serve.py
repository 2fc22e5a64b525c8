"""`lmjax serve` as its clients see it: OpenAI's own client, and bad ones, against a real server on a loopback port."""

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import httpx
import jax
import numpy as np
import pytest
from helpers import ROOT
from test_engine import POISON, opened

from lmjax.data.chat import ChatTemplate
from lmjax.decode.generate import SampleConfig, complete
from lmjax.errors import ConfigError
from lmjax.interop.hf import write_hf
from lmjax.serve import protocol
from lmjax.serve.app import make_app
from lmjax.serve.commands import run_serve
from lmjax.serve.engine import Engine
from lmjax.serve.metrics import BOUNDS, Histogram
from lmjax.serve.protocol import Limits, RequestError
from lmjax.serve.served import Served

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}a:"


def make_served(name: str = "tiny", template: bool = True, max_queue: int = 40, **limits) -> Served:
    engine = Engine(opened(), slots=4, context=300, max_queue=max_queue, chunk=4)
    tokenizer = opened().tokenizer
    return Served(opened(), engine, name, ChatTemplate(tokenizer, TEMPLATE) if template else None, "no template",
                  Limits(**limits))


@contextlib.contextmanager
def serving(served: Served, **access):
    """The address of a server in a thread, with its engine."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    server = uvicorn.Server(uvicorn.Config(make_app(served, **access), log_level="warning", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    served.engine.start()
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        served.engine.stop()
        listener.close()
    assert not thread.is_alive() and not served.engine._thread.is_alive(), "the server hangs"


@pytest.fixture(scope="module")
def served() -> Served:
    return make_served()


@pytest.fixture(scope="module")
def url(served):
    with serving(served, hosts=frozenset({"127.0.0.1"})) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def expected(prompt: str, seed: int = 1, index: int = 0, **config):
    """What `generate` makes of a prompt. Everything is sampled here, so that few programs are compiled."""
    return complete(opened().graphdef, opened().params, [opened().encode(prompt)], SampleConfig(**config),
                    key=jax.random.key(seed), rows=[index], vocab_size=257, eos_id=256, logprobs=3,
                    text_of=opened().tokenizer.decode)[0]


LIKE_SERVER = {"temperature": 1.0, "top_p": 1.0}


# ---- OpenAI's client -------------------------------------------------------------------------------------


def test_a_completion_is_what_generate_gives(client):
    right = expected("once upon", max_new_tokens=20, **LIKE_SERVER)
    got = client.completions.create(model="tiny", prompt="once upon", max_tokens=20, seed=1, logprobs=3)
    choice, scores = got.choices[0], got.choices[0].logprobs
    assert choice.text == right.text and choice.finish_reason == ("stop" if right.finish == "stop" else "length")
    assert got.usage.completion_tokens == len(right.tokens) + (right.finish == "stop")
    assert got.usage.prompt_tokens == len("once upon") and got.usage.total_tokens == (
        got.usage.prompt_tokens + got.usage.completion_tokens)
    np.testing.assert_allclose(scores.token_logprobs, right.logprobs, atol=1e-4)
    assert len(scores.tokens) == len(scores.text_offset) == len(scores.top_logprobs) == len(right.tokens)
    assert all(3 <= len(best) <= 4 and name in best for name, best in zip(scores.tokens, scores.top_logprobs,
                                                                         strict=True))
    assert client.completions.create(model="tiny", prompt="once upon", max_tokens=20, seed=2).choices[0].text != (
        choice.text)


def test_a_stream_says_the_same(client):
    whole = client.completions.create(model="tiny", prompt="once upon", max_tokens=20, seed=1, logprobs=2)
    parts = list(client.completions.create(model="tiny", prompt="once upon", max_tokens=20, seed=1, logprobs=2,
                                           stream=True, stream_options={"include_usage": True}))
    *events, last = parts
    assert "".join(e.choices[0].text for e in events) == whole.choices[0].text and len(events) > 3
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert sum((getattr(e.choices[0].logprobs, name) for e in events), []) == getattr(
            whole.choices[0].logprobs, name)
    assert [e.choices[0].finish_reason for e in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.choices == [] and last.usage == whole.usage


def test_several_prompts_and_choices(client):
    """Each is a row of its own; echo and ids are understood, and the order is OpenAI's."""
    got = client.completions.create(model="tiny", prompt=["once", [104, 105]], n=2, max_tokens=6, seed=1, echo=True)
    assert [c.index for c in got.choices] == [0, 1, 2, 3] and got.usage.prompt_tokens == 6
    for i, prompt in enumerate(("once", "once", "hi", "hi")):
        right = expected(prompt, index=i, max_new_tokens=6, **LIKE_SERVER)
        assert got.choices[i].text == prompt + right.text
    parts = list(client.completions.create(model="tiny", prompt=["once", "hi"], n=2, max_tokens=6, seed=1, echo=True,
                                           stream=True))
    for i in range(4):
        assert "".join(e.choices[0].text for e in parts if e.choices[0].index == i) == got.choices[i].text


TALK = [{"role": "user", "content": "hello"}]


def test_chat(client):
    """The template is applied, its end of turn ends an answer, and the stream's deltas are the answer."""
    ids = ChatTemplate(opened().tokenizer, TEMPLATE).ids(TALK)
    assert ids.tolist() == [*b"u:hello", 256, *b"a:"]
    right = complete(opened().graphdef, opened().params, [ids], SampleConfig(12, **LIKE_SERVER),
                     key=jax.random.key(1), vocab_size=257, eos_id=256, text_of=opened().tokenizer.decode)[0]
    got = client.chat.completions.create(model="tiny", messages=TALK, max_completion_tokens=12, seed=1, logprobs=True,
                                         top_logprobs=2)
    choice = got.choices[0]
    assert choice.message.content == right.text and choice.message.role == "assistant"
    assert got.usage.prompt_tokens == len(ids)
    said = choice.logprobs.content
    assert bytes(b for one in said for b in one.bytes).decode(errors="replace") == right.text
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in said)
    parts = list(client.chat.completions.create(model="tiny", messages=TALK, max_tokens=12, seed=1, stream=True,
                                                logprobs=True, top_logprobs=2))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in parts) == right.text
    again = [one for p in parts if p.choices[0].logprobs for one in p.choices[0].logprobs.content]
    assert [one.token for one in again] == [one.token for one in said]
    assert parts[-1].choices[0].finish_reason == choice.finish_reason


def test_stop_strings(client):
    free = client.completions.create(model="tiny", prompt="once upon", max_tokens=20, seed=1).choices[0].text
    stop = next(free[i:i + 2] for i in range(4, 18) if "\ufffd" not in free[i:i + 2])
    got = client.completions.create(model="tiny", prompt="once upon", max_tokens=20, seed=1, stop=[stop, "never"])
    assert got.choices[0].text == free[:free.index(stop)] and got.choices[0].finish_reason == "stop"
    assert got.usage.completion_tokens < 20
    parts = client.completions.create(model="tiny", prompt="once upon", max_tokens=20, seed=1, stop=stop, stream=True)
    assert "".join(p.choices[0].text for p in parts) == free[:free.index(stop)]


def test_models(client):
    assert [m.id for m in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").owned_by == "lmjax"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.models.retrieve("gpt-4o")


@pytest.mark.parametrize("wrong, param", [
    ({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"), ({"n": 0}, "n"), ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 400}, "messages"), ({"seed": 2**32}, "seed"),
    ({"stop": ["a"] * 5}, "stop"), ({"stop": [""]}, "stop"), ({"stop": [7]}, "stop"), ({"stop": {"id": 3}}, "stop"),
    ({"logit_bias": {"999": 1}}, "logit_bias"), ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"top_logprobs": 3}, "top_logprobs"), ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"), ({"stream_options": {}}, "stream_options"),
    ({"extra_body": {"min_p": 2}}, "min_p"), ({"extra_body": {"stop_token_ids": [1]}}, "stop_token_ids"),
    ({"messages": []}, "messages"), ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x" * 400}]}, "messages"),
])
def test_every_wrong_field_is_named(client, wrong, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**{"model": "tiny", "messages": TALK, "max_tokens": 5} | wrong)
    assert error.value.param == param and error.value.type == "invalid_request_error"
    assert param.partition("[")[0] in error.value.body["message"]


@pytest.mark.parametrize("wrong, param", [
    ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": None}, "prompt"), ({"prompt": [""]}, "prompt"),
    ({"prompt": [5, 999]}, "prompt"), ({"prompt": [1, "a"]}, "prompt"), ({"prompt": "x" * 400}, "prompt"),
    ({"suffix": "x"}, "suffix"), ({"best_of": 3}, "best_of"), ({"logprobs": 6}, "logprobs"),
    ({"echo": True, "logprobs": 1}, "echo"), ({"prompt": ["a"] * 40, "n": 2}, "n")])
def test_every_wrong_field_of_a_completion_is_named(client, wrong, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**{"model": "tiny", "prompt": "a", "max_tokens": 5} | wrong)
    assert error.value.param == param and param in error.value.body["message"]


# ---- other clients ---------------------------------------------------------------------------------------


def test_bodies_that_are_none(url):
    post = f"{url}/v1/completions"
    is_json = {"content-type": "application/json"}
    for body, headers, status, words in (
            (b'{"prompt": ', is_json, 400, "not valid JSON"), (b"[1]", is_json, 400, "a JSON list"),
            (b"\xff", is_json, 400, "not valid JSON"), (b'{"temperature": NaN}', is_json, 400, "NaN is not JSON"),
            (b"[" * 100_000, is_json, 400, "nested too deeply"), (b"x" * (2 << 20), is_json, 413, "larger than"),
            (b'{"prompt": "a\\ud800"}', is_json, 400, "character 1 is the lone surrogate U+D800"),
            (b'{"prompt": "a", "model": "\\ud800"}', is_json, 404, "is not here"),
            (b'{"prompt": "a"}', {"content-type": "text/plain"}, 415, "application/json")):
        got = httpx.post(post, content=body, headers=headers)
        assert got.status_code == status and words in got.json()["error"]["message"]

    def endless():
        for _ in range(40):
            yield b" " * 65536
    with contextlib.suppress(httpx.TransportError):  # the answer, or a closed door
        assert httpx.post(post, content=endless(), headers=is_json).status_code == 413
    assert httpx.get(f"{url}/v1/nothing").status_code == 404 and httpx.get(post).status_code == 405
    assert httpx.get(f"{url}/v1/nothing").json()["error"]["type"] == "invalid_request_error"


def test_other_pages_of_a_browser_are_kept_out(url):
    """DNS rebinding ends at the Host header; a form's POST at its content type; and nothing allows other origins."""
    for host, status in (("evil.example", 403), ("127.0.0.1", 200), ("127.0.0.1:80", 200), ("", 403)):
        got = httpx.get(f"{url}/v1/models", headers={"host": host, "origin": "http://evil.example"})
        assert got.status_code == status and not any("access-control" in name for name in got.headers)


def test_health_and_metrics(url, served, client):
    client.completions.create(model="tiny", prompt="a", max_tokens=3, seed=1)
    assert httpx.get(f"{url}/health").json() == {"status": "alive"} and httpx.get(f"{url}/ready").status_code == 200
    text = httpx.get(f"{url}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["lmjax_generated_tokens_total"]) == served.engine.metrics.generated_tokens > 3
    assert float(values['lmjax_http_responses_total{path="/v1/completions",status="200"}']) >= 1
    assert values["lmjax_slots"] == "4" and "lmjax_request_seconds_bucket{le=\"+Inf\"}" in values
    histogram = Histogram()
    for seconds in (BOUNDS[0], BOUNDS[0] * 1.01, 1e9):
        histogram.observe(seconds)
    assert histogram.counts[0] == histogram.counts[1] == histogram.counts[-1] == 1


def test_nan_is_an_error_of_that_request_alone(client, monkeypatch, served):
    """The poisoned token is in the model's vocabulary, though not in the tokenizer's, so it is let through here."""
    monkeypatch.setattr(served, "_ids", lambda prompt: np.array(
        [POISON] if prompt == "poison" else list(prompt.encode()), np.int32), raising=False)
    answers = []

    def ask(prompt: str, **kwargs) -> None:
        try:
            got = client.completions.create(model="tiny", prompt=prompt, max_tokens=15, seed=1, **kwargs)
            answers.append((prompt, list(got) and 200 if kwargs else 200))
        except openai.APIStatusError as error:
            answers.append((prompt, error.status_code))
            assert "not finite" in error.body["message"]
    threads = [threading.Thread(target=ask, args=(prompt,), kwargs=kwargs) for prompt, kwargs in (
        ("good", {}), ("poison", {}), ("better", {}), ("poison", {"stream": True}))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(answers) == [("better", 200), ("good", 200), ("poison", 500), ("poison", 500)]


def test_a_client_that_leaves_frees_its_slot(url, served):
    """In the middle of a stream, and while waiting for a whole answer."""
    def idle() -> bool:
        for _ in range(600):
            if not served.engine.busy:
                return True
            threading.Event().wait(0.05)
        return False
    before = served.engine.metrics.finished["cancelled"]
    body = {"prompt": "a long one", "max_tokens": 280, "logit_bias": {"256": -100}}
    with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}, timeout=60) as got:
        assert next(got.iter_lines()).startswith("data: ") and served.engine.running == 1
    assert idle()
    with contextlib.suppress(httpx.TimeoutException):
        httpx.post(f"{url}/v1/completions", json=body | {"n": 8}, timeout=0.3)
        pytest.skip("this machine is too quick for a client to leave")
    assert idle() and served.engine.metrics.finished["cancelled"] > before


def test_a_thousand_at_once():
    """All are answered or told to come back, in order, and the server answers afterwards."""
    served = make_served(max_queue=100)
    with serving(served) as url:
        async def all_of_them():
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(limits=limits, timeout=120) as client:
                return await asyncio.gather(*(client.post(f"{url}/v1/completions", json={
                    "prompt": f"number {i}", "max_tokens": 3, "seed": i}) for i in range(1000)), return_exceptions=True)
        answers = asyncio.run(all_of_them())
        assert not [a for a in answers if isinstance(a, Exception)]
        codes = [a.status_code for a in answers]
        assert set(codes) == {200, 429} and codes.count(200) >= 100
        refused = next(a for a in answers if a.status_code == 429)
        assert 1 <= int(refused.headers["retry-after"]) <= 60 and refused.json()["error"]["code"] == "queue_full"
        after = httpx.post(f"{url}/v1/completions", json={"prompt": "after", "max_tokens": 3}, timeout=60)
        assert after.status_code == 200 and not served.engine.busy


def test_time_limit_and_keys():
    served = make_served(template=False, seconds=0.0)
    with serving(served, api_key="a-key-of-length") as url:
        post, right = f"{url}/v1/completions", {"authorization": "Bearer a-key-of-length"}
        for headers in ({}, {"authorization": "Bearer wrong-key-here"}, {"authorization": "a-key-of-length"}):
            got = httpx.post(post, json={"prompt": "a"}, headers=headers)
            assert got.status_code == 401 and got.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{url}/metrics").status_code == 401 and httpx.get(f"{url}/health").status_code == 200
        got = httpx.post(post, json={"prompt": "a"}, headers=right)
        assert got.status_code == 504 and got.headers["x-should-retry"] == "false"
        got = httpx.post(f"{url}/v1/chat/completions", json={"messages": TALK}, headers=right)
        assert got.status_code == 400 and got.json()["error"]["code"] == "no_chat_template"


def test_the_command(tmp_path, capsys):
    """A process: it says where it listens, answers, finishes what SIGTERM finds at work, and ends with 0."""
    config = dataclasses.replace(opened().config, windows=(0,), max_seq_len=256)
    params = {**opened().params, "embed_VD": np.nan_to_num(np.asarray(opened().params["embed_VD"]))}
    write_hf(tmp_path / "small", config, params, opened().tokenizer)
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    process = subprocess.Popen([sys.executable, "-m", "lmjax", "serve", str(tmp_path / "small"), "--port", "0"],
                               env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        said = process.stdout.readline()
        assert "small: http://127.0.0.1:" in said, process.communicate()
        url = said.split()[1]
        body = {"prompt": "tell", "max_tokens": 200, "stream": True, "logit_bias": {"256": -100}, "seed": 3}
        with httpx.stream("POST", f"{url}/completions", json=body, timeout=120) as got:
            lines = got.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            events = [json.loads(line[6:]) for line in [first, *lines] if line.startswith("data: {")]
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    finally:
        process.kill()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for args, words in ((["--host", "0.0.0.0"], "--api-key-file"), (["--port", port], "choose another"),
                            (["--port", "70000"], "--port 70000"), (["--api-key-file", str(tmp_path / "no")], "read")):
            with pytest.raises(ConfigError, match=words):
                run_serve([str(tmp_path / "small"), *args])


def test_unknown_fields_are_found_by_the_parser_alone():
    """Known wrong: a parser that leaves fields over would take anything."""
    with pytest.raises(RequestError) as error:
        protocol.parse_completion({"prompt": "a", "temprature": 1}, Limits(), 257)
    assert error.value.param == "temprature" and error.value.status == 400
    fields = protocol.Fields({"a": 1})
    with pytest.raises(RequestError):
        fields.done()
