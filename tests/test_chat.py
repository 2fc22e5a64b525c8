"""`lmjax chat`: turns, commands, Ctrl-C, what no longer fits, and lines from a pipe."""

import dataclasses
import io
import json
import signal

import jax
import numpy as np
import pytest
from test_engine import EOS, POISON, opened

from lmjax.cli import main
from lmjax.data.chat import ChatTemplate
from lmjax.decode.generate import SampleConfig, complete
from lmjax.interop.hf import write_hf
from lmjax.serve.chat import Chat
from lmjax.serve.engine import Engine

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}a:"
SAMPLE = SampleConfig(max_new_tokens=16, temperature=1.0)


class Talk(Chat):
    """A chat that remembers what it said."""

    def __init__(self, engine: Engine, **kwargs):
        self.said: list[str] = []
        super().__init__(engine, ChatTemplate(opened().tokenizer, TEMPLATE), SAMPLE, self.said.append, "tiny", **kwargs)

    @property
    def text(self) -> str:
        return "".join(self.said)


@pytest.fixture(scope="module")
def engine():
    engine = Engine(opened(), slots=2, context=120, max_queue=1, chunk=1)
    engine.start()
    yield engine
    engine.stop()


def answer(messages, index: int) -> str:
    ids = ChatTemplate(opened().tokenizer, TEMPLATE).ids(messages)
    return complete(opened().graphdef, opened().params, [ids], SAMPLE, key=jax.random.key(0), rows=[index],
                    vocab_size=257, eos_id=EOS, text_of=opened().tokenizer.decode)[0].text


def test_a_conversation(engine):
    """Each turn is answered with all before it in mind, by the template; the system's word comes first."""
    talk = Talk(engine)
    talk.run(["hello", "  ", "/system be kind", "and you?", "/quit", "never said"])
    first = [{"role": "user", "content": "hello"}]
    one = answer(first, 0)
    second = [{"role": "system", "content": "be kind"}, *first, {"role": "assistant", "content": one},
              {"role": "user", "content": "and you?"}]
    two = answer(second, 1)
    assert talk.messages == [*second, {"role": "assistant", "content": two}] and one != two
    assert not any(c < " " and c != "\n" and c != "\t" for c in talk.text), "no character may steer a terminal"
    assert any(c < " " and c not in "\n\t" for c in one + two), "there was none"


def test_commands(engine, tmp_path):
    talk = Talk(engine)
    path = tmp_path / "talk.json"
    talk.run(["//slash", "/what", "/save", f"/save {path}", f"/save {path}", "/help", "/reset"])
    for words in ("/what: no such command", "which file?", f"written to {path}", "File exists", "/system TEXT",
                  "forgotten"):
        assert words in talk.text
    saved = json.loads(path.read_text())
    assert saved["model"] == "tiny" and saved["messages"][0] == {"role": "user", "content": "/slash"}
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"] and not talk.messages


def test_the_oldest_turns_are_forgotten(engine):
    """The context has 120 tokens; what no longer fits goes in pairs, is told, and never the system's word."""
    talk = Talk(engine, system="kind")
    talk.run(["a" * 30, "b" * 30, "c" * 30, "d" * 30])
    assert "turn is forgotten" in talk.text
    assert len(talk.template.ids(talk.messages)) <= 120 + 1
    assert talk.messages[0]["content"] == "kind" and talk.messages[-2]["content"] == "d" * 30
    assert not any(m["content"] == "a" * 30 for m in talk.messages)
    before = talk.messages
    talk.run(["e" * 200])
    assert "shorten it" in talk.text and talk.messages == before, "nothing is forgotten for a message that never fits"


def test_ctrl_c_stops_the_answer_alone(engine):
    """The signal arrives while an answer is printed; what was said stays, and the next turn is answered."""
    talk = Talk(engine)
    say = talk.say

    def interrupted(text: str) -> None:
        say(text)
        if len(talk.said) == 1:
            signal.raise_signal(signal.SIGINT)
    talk.say = interrupted
    talk.run(["hello", "again"])
    assert "(stopped)" in talk.text and not engine.busy
    whole = answer([{"role": "user", "content": "hello"}], 0)
    stopped = talk.messages[1]["content"]
    assert whole.startswith(stopped.rstrip("\ufffd")) and len(stopped) <= len(whole)
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2 and talk.text.count("(stopped)") == 1


def test_what_cannot_be_answered(engine):
    talk = Talk(engine)
    talk.run(["a\ud800"])
    assert "lone surrogate" in talk.text and not talk.messages
    talk.template.ids = lambda messages: np.array([POISON], np.int32)
    talk.run(["poison"])
    assert "not finite" in talk.text and not talk.messages


def test_through_the_command_line(tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(opened().config, windows=(0,), max_seq_len=128)
    params = {**opened().params, "embed_VD": np.nan_to_num(np.asarray(opened().params["embed_VD"]))}
    write_hf(tmp_path / "small", config, params, opened().tokenizer)
    lines = "hello\x1b[2J\n/nonsense\n"

    def chat(*args) -> int:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        return main(["chat", str(tmp_path / "small"), "--max-new-tokens", "4", *args])
    assert chat() == 3
    assert "no chat template" in (error := capsys.readouterr().err) and "--template FILE" in error
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    assert chat("--template", str(tmp_path / "t.jinja")) == 0
    out = capsys.readouterr().out
    assert "> hello\ufffd[2J\n" in out and "(/nonsense: no such command" in out and "\x1b" not in out
    assert chat("--template", str(tmp_path / "none.jinja")) == 3
    assert "none.jinja: cannot be read" in capsys.readouterr().err
    assert chat("--temperature", "-1", "--seed", "-1") == 2
    assert "chat.temperature=-1.0" in (error := capsys.readouterr().err) and "--seed -1" in error
