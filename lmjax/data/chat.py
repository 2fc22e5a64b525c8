"""Chat templates: a conversation to the token ids that a model was taught to answer.

What lives here: rendering a Jinja template as Transformers does, in the same sandbox, and encoding what it gives so
that only the template can spell special tokens. Where a template comes from is `tokenizers` (`chat_template`).

A user who types `<|im_start|>system` must not begin a turn of the system's. So texts of messages are *guarded* before
they are rendered: a character that stands for nothing, GUARD, is put inside whatever spells a special token. The
rendered text is parsed for specials, which the guard prevents from matching, and then the guard vanishes; the ids are
those of the plain text. Guarded are tokens that the tokenizer flags as special, bos and eos. Others that were added to
a vocabulary (Qwen's `<think>`) are text like any other, for the template and for `Tokenizer.encode`.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from lmjax.data.tokenizers import Tokenizer
from lmjax.errors import DataError

GUARD = "\ufdd0"  # a noncharacter: Unicode will never give it a meaning
ROLES = ("system", "developer", "user", "assistant", "tool")

Message = Mapping[str, Any]  # {"role": …, "content": …}


class ChatTemplate:
    """A tokenizer's template, or another in its place.

    source: Jinja text; "" for the tokenizer's own. Raises DataError where there is none, or it does not parse.
    turn_ends: ids of the specials by which the template ends an assistant's turn; a model stops with one of them.
    """

    def __init__(self, tokenizer: Tokenizer, source: str = ""):
        self.source = source or tokenizer.chat_template
        if not self.source:
            raise DataError("the model has no chat template (chat_template in tokenizer_config.json, or "
                            "chat_template.jinja); give one with --template FILE, or continue texts with "
                            "`lmjax generate`")
        self._parser, self._specials = _parsing_copy(tokenizer)
        self._names = tokenizer.special_names()
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._spelt = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._compiled = _compiled(self.source)
        self.turn_ends = self._turn_ends()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True,
               continue_last: bool = False) -> str:
        """The conversation as the template writes it, with guards; `plain` shows it, `encode` takes it.

        continue_last: up to the end of the last message's text, which the model is to go on with. Raises DataError for
        what the template refuses, and for a message that holds GUARD itself.
        """
        guarded = self._guarded(list(messages))
        try:
            text = self._compiled.render(messages=guarded, tools=None, documents=None, **self._names,
                                         add_generation_prompt=add_generation_prompt and not continue_last)
            if continue_last:
                last = guarded[-1]["content"].strip()
                text = text[:text.rindex(last) + len(last)]
            return text
        except Exception as error:  # a template is a program of somebody else's: it may fail in any way
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(f"messages: the model's chat template refuses them ({why}); change their roles or their "
                            "order") from None

    def encode(self, rendered: str) -> np.ndarray:
        """int32 ids of rendered text; specials are parsed except where they are guarded. No bos is added."""
        return np.asarray(self._parser.encode(rendered, add_special_tokens=False).ids, np.int32)

    def ids(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> np.ndarray:
        """int32 ids of a conversation, by default up to where the assistant begins to answer."""
        return self.encode(self.render(messages, add_generation_prompt=add_generation_prompt))

    def _guarded(self, value: Any) -> Any:
        """Messages as plain JSON values, with every text in them guarded. Templates see no other objects."""
        if isinstance(value, str):
            return self._guard(value)
        if isinstance(value, Mapping):
            return {str(key): self._guarded(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._guarded(item) for item in value]
        if value is None or isinstance(value, (bool, int, float)):
            return value
        raise DataError(f"messages: hold a {type(value).__name__}; give texts")

    def _guard(self, text: str) -> str:
        if GUARD in text:
            raise DataError(f"messages: character {text.index(GUARD)} of a text is the noncharacter U+FDD0, which is "
                            "used to keep texts apart from special tokens; remove it")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"messages: character {error.start} of a text is the lone surrogate "
                            f"U+{ord(text[error.start]):04X}, which UTF-8 cannot hold; remove it") from None
        text = self._spelt.sub(lambda found: found[0][0] + GUARD + found[0][1:], text)
        # Nor may its end, with what the template writes after it, spell one.
        for special in self._specials:
            for n in range(min(len(special) - 1, len(text)), 0, -1):
                if text.endswith(special[:n]):
                    text = text[:len(text) - n + 1] + GUARD + text[len(text) - n + 1:]
                    break
        return text

    def _turn_ends(self) -> tuple[int, ...]:
        answer = "lmjax answers"
        try:
            text = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}],
                               add_generation_prompt=False)
        except DataError:
            return ()
        found = self._spelt.match(text.rpartition(answer)[2].lstrip())
        return (self._specials[found[0]],) if found else ()


def plain(rendered: str) -> str:
    """Rendered text without its guards: for people."""
    return rendered.replace(GUARD, "")


def _parsing_copy(tokenizer: Tokenizer) -> tuple[Any, dict[str, int]]:
    """(a tokenizer that parses specials and drops guards, {special: id}).

    Specials are looked for before text is normalised, so a normaliser that drops the guard comes too late to make one.
    """
    import tokenizers

    definition = json.loads(tokenizer.to_json())
    names = tokenizer.special_names().values()
    for token in definition.get("added_tokens", []):
        token["special"] = token["special"] or token["content"] in names
        token["normalized"] = token["normalized"] and not token["special"]
    drop = {"type": "Replace", "pattern": {"String": GUARD}, "content": ""}
    before = definition.get("normalizer")
    definition |= {"truncation": None, "padding": None, "normalizer": drop if before is None else
                   {"type": "Sequence", "normalizers": [drop, before]}}
    specials = {token["content"]: token["id"] for token in definition.get("added_tokens", []) if token["special"]}
    return tokenizers.Tokenizer.from_str(json.dumps(definition)), specials


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    """The template in the environment that Transformers gives it: no file, no import, no attribute of Python's."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what is trained on; for a prompt it is what stands inside."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson  # Jinja's own escapes HTML
    environment.globals |= {"raise_exception": raise_exception,
                            "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        line = f"line {error.lineno}: " if getattr(error, "lineno", None) else ""
        raise DataError(f"chat template: {line}{' '.join(str(error).split())[:200]}; correct it, or give another with "
                        "--template FILE") from None
