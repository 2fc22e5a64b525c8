"""A conversation in the terminal, line by line, through an engine of one slot.

What lives here: the turns, what fits of them, and the commands. How an answer is made is `engine`; the template is
`lmjax.data.chat`. Works as well where stdin is a file or a pipe: each line is a message, and is repeated in the output.
"""

import dataclasses
import json
import queue
from collections.abc import Callable, Iterable
from pathlib import Path

from lmjax.data.chat import ChatTemplate, Message
from lmjax.decode.processors import SampleConfig
from lmjax.errors import DataError
from lmjax.records import printable
from lmjax.serve.batch import Row
from lmjax.serve.engine import NOT_FINITE, Engine, Job, Update
from lmjax.serve.replies import Progress

HELP = """/reset        forget the conversation
/system TEXT  what the model is told before all turns; without TEXT nothing
/save FILE    write the conversation as JSON
/quit         end; so does Ctrl-D. Ctrl-C stops an answer
//TEXT        a message that begins with a slash
"""


@dataclasses.dataclass
class Chat:
    """A conversation with a model. seed: of all draws, with the turn's number. say: prints text as it is."""

    engine: Engine
    template: ChatTemplate
    sample: SampleConfig
    say: Callable[[str], None]
    name: str = ""
    seed: int = 0
    system: str = ""
    turns: list[Message] = dataclasses.field(default_factory=list)
    asked: int = 0  # questions so far, forgotten ones included

    def run(self, lines: Iterable[str]) -> None:
        """Answers lines until they end, or /quit. Raises nothing for what a line may hold."""
        for line in lines:
            if line.startswith("/") and not line.startswith("//"):
                if not self._command(line):
                    return
            elif line.strip():
                self._ask(line[1:] if line.startswith("//") else line)

    @property
    def messages(self) -> list[Message]:
        return [{"role": "system", "content": self.system}, *self.turns] if self.system else list(self.turns)

    # ---- commands ----------------------------------------------------------------------------------------

    def _command(self, line: str) -> bool:
        """Whether to go on."""
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if name in ("/quit", "/exit"):
            return False
        if name == "/reset":
            self.turns.clear()
            self.say("(forgotten)\n")
        elif name == "/system":
            self.system = rest
            self.say("(set, from the next turn on)\n" if rest else "(taken away, from the next turn on)\n")
        elif name == "/save":
            self._save(rest)
        elif name == "/help":
            self.say(HELP)
        else:
            self.say(f"({printable(name)}: no such command; /help tells them, and // begins a message with a slash)\n")
        return True

    def _save(self, path: str) -> None:
        if not path:
            self.say("(/save FILE: which file?)\n")
            return
        text = json.dumps({"model": self.name, "messages": self.messages}, ensure_ascii=False, indent=1) + "\n"
        try:
            with Path(path).expanduser().open("x", encoding="utf-8") as file:  # nothing is written over
                file.write(text)
            self.say(f"(written to {printable(path)})\n")
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "not a name for a file"
            self.say(f"({printable(path)}: {why}; give another name)\n")

    # ---- turns -------------------------------------------------------------------------------------------

    def _ask(self, text: str) -> None:
        self.turns.append({"role": "user", "content": text})
        try:
            ids = self._fitting()
        except DataError as error:
            self.turns.pop()
            self.say(f"({printable(str(error))})\n")
            return
        room = self.engine.context - len(ids)
        config = dataclasses.replace(self.sample, max_new_tokens=min(self.sample.max_new_tokens, room))
        answer = self._answer(Row(ids, config, self.seed, self.asked))
        self.asked += 1
        if answer is None:
            self.turns.pop()
        else:
            self.turns.append({"role": "assistant", "content": answer})

    def _fitting(self):
        """Ids of the conversation, without as many of the oldest turns as do not fit beside an answer."""
        room = self.engine.context - min(self.sample.max_new_tokens, self.engine.context // 2)
        turns, before = self.turns, len(self.messages) - len(self.turns)
        while len(ids := self.template.ids([*self.messages[:before], *turns])) > room:
            if len(turns) < 2:
                raise DataError(f"the message makes {len(ids)} tokens, and {room} fit into the context beside an "
                                "answer; shorten it")
            turns = turns[2:]
        dropped, self.turns = (len(self.turns) - len(turns)) // 2, turns
        if dropped:
            self.say(f"(the context is full: the oldest {'turn is' if dropped == 1 else f'{dropped} turns are'} "
                     "forgotten)\n")
        return ids

    def _answer(self, row: Row) -> str | None:
        """Prints an answer as it comes, and gives it; None where there is none. Ctrl-C keeps what was said."""
        updates: queue.Queue[Update] = queue.Queue()
        job, progress, text = Job(row, updates.put, stream=True), Progress(), ""
        self.engine.submit([job])
        while True:
            try:
                update = updates.get()
                if not update.error:
                    new, *_ = progress.news(update.completion, None)
                    text += new
                    self.say(printable(new))
                if update.final:
                    break
            except KeyboardInterrupt:
                self.engine.cancel([job])
        if update.error == "cancelled":
            self.say(" (stopped)\n")
            return text
        if update.error:
            why = {"non_finite": f"logits are not finite: {NOT_FINITE}"}.get(update.error, f"no answer: {update.error}")
            self.say(f"({why})\n")
            return None
        told = {"length": f" (cut at {row.config.max_new_tokens} tokens)", "loop": " (going in circles)"}
        self.say(told.get(update.completion.finish, "") + "\n")
        return text


def terminal_lines(prompt: str = "> ") -> Iterable[str]:
    """Lines that somebody types, until Ctrl-D. Ctrl-C empties the line."""
    try:
        import readline  # noqa: F401  (gives `input` a history and editing keys)
    except ImportError:
        pass
    while True:
        try:
            yield input(prompt)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit ends)")


def piped_lines(stream: Iterable[str], say: Callable[[str], None], prompt: str = "> ") -> Iterable[str]:
    """Lines of a stream, each said as if it had been typed."""
    for line in stream:
        say(prompt + printable(line.rstrip("\n")) + "\n")
        yield line.rstrip("\n")
