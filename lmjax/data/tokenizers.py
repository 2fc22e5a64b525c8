"""Tokenizers: text to token ids and back.

What lives here: the byte-level default, any Hugging Face `tokenizer.json` (file, folder or Hub id), and
training a byte-level BPE. What does not: where text comes from (`sources`), how tokens are stored
(`prepare`), and the use of chat templates (`chat`; here they are only kept).

Every tokenizer has a `fingerprint` (sha256 of its whole definition), so that shards, checkpoints and
configs can tell whether they speak of the same one.
"""

import hashlib
import itertools
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.errors import DataError

DOCUMENT = "<|document|>"
MAX_BPE = 2**20  # tokens of a vocabulary trained here

# Looked for in this order when no tokenizer_config.json names them.
_EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|document|>", "[EOS]", "[SEP]",
              "<|eos|>", "<｜end▁of▁sentence｜>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>")
_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|document|>", "[BOS]", "[CLS]", "<|startoftext|>",
              "<|bos|>", "<｜begin▁of▁sentence｜>")


class Tokenizer:
    """What every tokenizer offers. Ids are in [0, vocab_size).

    `name` is short and for people; `fingerprint` is what is compared. `bos_id` may equal `eos_id`.
    `chat_template` is the Jinja text that came with the tokenizer, "" if none. `prefix_ids` is what its maker puts
    before every text; `encode` does not.
    """

    name: str
    vocab_size: int
    bos_id: int
    eos_id: int
    fingerprint: str
    chat_template: str = ""
    prefix_ids: tuple[int, ...] = ()

    def encode(self, text: str) -> np.ndarray:
        """Token ids, int32 [tokens]. Adds no specials; text that spells a special stays ordinary text."""
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids. Specials are left out and bytes that are no UTF-8 become U+FFFD.

        Never raises for ids in [0, vocab_size); an id outside is a DataError.
        """
        raise NotImplementedError

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, int32 [vocab_size]; 0 for specials.

        Summed over predicted tokens this is the denominator of bits per byte. Exact for bytes and byte-level
        BPE whose normaliser leaves text alone. Approximate for SentencePiece-like vocabularies (a leading
        "▁" counts as one space, also where decoding drops it) and for WordPiece (spaces are not counted).
        """
        raise NotImplementedError

    def to_json(self) -> str:
        """The whole definition, in the format of `tokenizer.json`."""
        raise NotImplementedError

    def special_names(self) -> dict[str, str]:
        """What a `tokenizer_config.json` has to say for `to_json` to be read back alike; {} if nothing."""
        return {}

    def save(self, path: str | Path) -> None:
        """Writes `tokenizer.json`; `load_tokenizer` of it gives the same fingerprint."""
        Path(path).write_text(self.to_json(), encoding="utf-8")


class ByteTokenizer(Tokenizer):
    """Ids 0..255 are the bytes of UTF-8; 256 is `<|document|>`, used both as bos and as eos."""

    def __init__(self) -> None:
        self.name = "bytes"
        self.vocab_size = 257
        self.bos_id = self.eos_id = 256
        self.fingerprint = _fingerprint(_byte_definition(), 256, 256)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        ids_T = _check_ids(ids, self.vocab_size)
        return ids_T[ids_T < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        return (np.arange(257) < 256).astype(np.int32)

    def special_names(self) -> dict[str, str]:
        return {"bos_token": DOCUMENT, "eos_token": DOCUMENT}

    def to_json(self) -> str:
        # Written as a byte-level BPE without merges, so that other libraries can read an exported model.
        return _canonical(_byte_definition())


class HFTokenizer(Tokenizer):
    """Any tokenizer of the `tokenizers` library.

    `source` is a `tokenizer.json`, a folder that holds one, or a `tokenizers.Tokenizer`. bos and eos are
    taken from `tokenizer_config.json` beside it, else found by their usual names; where only one exists it
    serves as both. Padding and truncation in the file are switched off. DataError: no such file, not a
    tokenizer, no usable special token.
    """

    def __init__(self, source: Any, name: str = "", config: dict[str, Any] | None = None) -> None:
        if isinstance(source, str | Path):
            path = _tokenizer_file(Path(source).expanduser())
            definition, where = _read_definition(path), str(path)
            config = _read_config(path.parent) if config is None else config
            name = name or _short_name(path)
        else:
            definition, where = json.loads(source.to_str()), "the given tokenizer"
            name = name or str(definition["model"].get("type", "hf")).lower()
        self.name = name
        self._load(definition, config or {}, where)

    def _load(self, definition: dict[str, Any], config: dict[str, Any], where: str) -> None:
        import tokenizers

        runtime = json.loads(json.dumps(definition)) | {"truncation": None, "padding": None}
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(runtime))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a bare Exception for most kinds of damage, and a Rust panic, which is none
            raise DataError(f"{where}: not a tokenizer.json that `tokenizers` can read ({_one_line(error)}); "
                            "save it again with tokenizer.save()") from None
        self.bos_id, self.eos_id = _find_specials(self._tokenizer, config, where)
        # A bos or eos that is not flagged special would be matched inside ordinary text: flag it.
        flagged = False
        for token in runtime.get("added_tokens", []):
            if token["id"] in (self.bos_id, self.eos_id) and not token["special"]:
                token["special"] = flagged = True
        if flagged:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(runtime))
        self.chat_template = _chat_template(config)
        self.prefix_ids = _prefix_ids(self._tokenizer, config, self.bos_id)
        self._tokenizer.encode_special_tokens = True  # text is never parsed for specials
        self._definition = definition
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        bos = self._tokenizer.id_to_token(self.bos_id)
        try:
            self.fingerprint = _fingerprint(_without_bos(definition, bos, self.bos_id), self.bos_id, self.eos_id)
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: holds half a character ({_one_line(error)}), which no text has; save it again "
                            "with tokenizer.save()") from None

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            for text in texts:
                _utf8(text)  # a lone surrogate: say where
            raise
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(_check_ids(ids, self.vocab_size).tolist(), skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        added = {token["id"]: token for token in self._definition.get("added_tokens", [])}
        byte_level = '"ByteLevel"' in json.dumps(
            [self._definition.get("decoder"), self._definition.get("pre_tokenizer")])
        sizes_V = np.zeros(self.vocab_size, np.int32)
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if index in (self.bos_id, self.eos_id) or added.get(index, {}).get("special"):
                continue
            if byte_level and index not in added:
                sizes_V[index] = len(token)  # each character of the byte alphabet stands for one byte
            else:
                sizes_V[index] = _piece_bytes(token)
        return sizes_V

    def to_json(self) -> str:
        return _canonical(self._definition)

    def save(self, path: str | Path) -> None:
        """Writes the file and, where it does not say all, `tokenizer_config.json` beside it."""
        path = Path(path)
        super().save(path)
        config: dict[str, Any] = {}
        if _find_specials(self._tokenizer, {}, "", missing=-1) != (self.bos_id, self.eos_id):
            config |= self.special_names()
        if _prefix_ids(self._tokenizer, {}, self.bos_id) != self.prefix_ids:
            config["add_bos_token"] = bool(self.prefix_ids)
        if self.chat_template:
            config["chat_template"] = self.chat_template
        if config:
            text = json.dumps(config, indent=1, ensure_ascii=False)
            (path.parent / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def special_names(self) -> dict[str, str]:
        """{"bos_token": …, "eos_token": …}, as in tokenizer_config.json."""
        return {"bos_token": self._tokenizer.id_to_token(self.bos_id),
                "eos_token": self._tokenizer.id_to_token(self.eos_id)}


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`: "bytes", the path of a `tokenizer.json` or its folder, or a Hub id.

    DataError: no such file, damaged file, or the Hub cannot be reached.
    """
    if name == "bytes":
        return ByteTokenizer()
    try:
        path = Path(name).expanduser()
        there = path.exists()
    except (OSError, ValueError, RuntimeError):  # too long, holds U+0000, no such user after "~"
        raise DataError(f"tokenizer {name[:80]!r}: no such file, and no name that a file could have; give \"bytes\" or "
                        "the path of a tokenizer.json") from None
    if there:
        path = _tokenizer_file(path)
        config = _read_config(path.parent)
        return tokenizer_from_json(_read_definition(path), _short_name(path), config, str(path))
    looks_like_path = path.is_absolute() or name.startswith((".", "~")) or name.endswith(".json")
    if looks_like_path or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise DataError(f"tokenizer {name!r}: no such file; give \"bytes\", the path of a tokenizer.json or "
                        "a Hub id like \"org/name\"")
    return _from_hub(name)


def tokenizer_from_json(definition: str | dict[str, Any], name: str = "",
                        config: dict[str, Any] | None = None, where: str = "") -> Tokenizer:
    """The tokenizer that `to_json` described; the byte tokenizer's own definition gives a ByteTokenizer.

    `config` is the content of a tokenizer_config.json, `where` the place that errors name.
    """
    parsed = json.loads(definition) if isinstance(definition, str) else definition
    if parsed == _byte_definition():
        return ByteTokenizer()
    tokenizer = HFTokenizer.__new__(HFTokenizer)
    tokenizer.name = name or str(parsed["model"].get("type", "hf")).lower()
    tokenizer._load(parsed, config or {}, where or f"tokenizer {name or 'definition'}")
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> HFTokenizer:
    """A byte-level BPE trained on `texts`: 256 bytes, `<|document|>` (bos and eos), and the best merges.

    The same texts in the same order give the same fingerprint. Text is cut before merging so that numbers
    are groups of at most three digits and a line break with its indentation is one piece, which keeps
    source code short. Warns when the text is too small for `vocab_size`. DataError: vocab_size not from 257 to
    MAX_BPE, or no text at all.
    """
    if not 257 <= vocab_size <= MAX_BPE:  # the library makes room for all of them first, and aborts where it cannot
        raise DataError(f"bpe vocab_size = {vocab_size}: must be at least 257 (256 bytes and {DOCUMENT}) and at "
                        f"most {MAX_BPE}")
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[DOCUMENT], show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(_some_text(texts), trainer)
    built = tokenizer.get_vocab_size()
    if built < vocab_size:
        warnings.warn(f"the text has too few repeated pieces for {vocab_size} tokens: the tokenizer has "
                      f"{built}",
                      stacklevel=2)
    return HFTokenizer(tokenizer, name=f"bpe{built}")


# Pieces that merges never cross, tried in this order: line breaks with the next line's indentation; a word or
# identifier with one space or dot before it; up to three digits; punctuation with one space before it; other
# whitespace, leaving one space for the piece that follows.
_PIECES = (r"(?:\r?\n)+[ \t]*|[ .]?[\p{L}\p{M}_]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}_]+"
           r"|[^\S\r\n]+(?=[^\S\r\n]\S)|\s+")


def _some_text(texts: Iterable[str]) -> Iterator[str]:
    count = 0
    for text in texts:
        count += bool(text)
        yield text
    if not count:
        raise DataError("tokenizer training: there is no text to train on; give a source with documents")


def _byte_definition() -> dict[str, Any]:
    letters = _byte_letters()
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": 256, "content": DOCUMENT, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                          "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": False, "merges": [],
                  "vocab": {letters[byte]: byte for byte in range(256)} | {DOCUMENT: 256}},
    }


def _byte_letters() -> list[str]:
    """The character that byte-level BPE writes for each byte: itself if printable, else from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _find_specials(tokenizer: Any, config: dict[str, Any], where: str,
                   missing: int | None = None) -> tuple[int, int]:
    """(bos_id, eos_id). `missing` is returned for both instead of an error."""

    def named(key: str, usual: tuple[str, ...]) -> int | None:
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if value:
            index = tokenizer.token_to_id(value) if isinstance(value, str) else None
            if index is None:
                raise DataError(f"{where}: tokenizer_config.json names {key} = {value!r:.80}, which the "
                                "vocabulary does not have; correct that file")
            return index
        found = (tokenizer.token_to_id(token) for token in usual)
        return next((index for index in found if index is not None), None)

    bos, eos = named("bos_token", _BOS_NAMES), named("eos_token", _EOS_NAMES)
    bos, eos = (eos if bos is None else bos), (bos if eos is None else eos)
    if bos is None or eos is None:
        if missing is not None:
            return missing, missing
        raise DataError(f"{where}: found no token to mark where documents begin and end; put a "
                        'tokenizer_config.json beside it with {"eos_token": "<the token>"}')
    return bos, eos


def _chat_template(config: dict[str, Any]) -> str:
    """The template of a tokenizer_config.json; of several, the one called default."""
    template = config.get("chat_template") or ""
    if isinstance(template, list):
        named = {str(item.get("name")): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default") or ""
    return template if isinstance(template, str) else ""


def _prefix_ids(tokenizer: Any, config: dict[str, Any], bos_id: int) -> tuple[int, ...]:
    """What stands before a text: what the post-processor adds; without one, bos where the config says so."""
    if tokenizer.post_processor is None:
        return (bos_id,) if config.get("add_bos_token") is True else ()
    encoding = tokenizer.encode("a", add_special_tokens=True)
    leading = itertools.takewhile(lambda pair: pair[1], zip(encoding.ids, encoding.special_tokens_mask, strict=True))
    return tuple(index for index, _ in leading)


def json_with_bos(tokenizer: Tokenizer) -> str:
    """`to_json` with a post-processor that puts bos before every text, unless there is one that does.

    For other libraries. It changes no id that `encode` gives, and neither the fingerprint.
    """
    definition = json.loads(tokenizer.to_json())
    before = definition.get("post_processor")
    if before is not None and tokenizer.prefix_ids:
        return tokenizer.to_json()
    template = _bos_template(tokenizer.special_names()["bos_token"], tokenizer.bos_id)
    both = template if before is None else {"type": "Sequence", "processors": [before, template]}
    return _canonical(definition | {"post_processor": both})


def _without_bos(definition: dict[str, Any], bos: str, bos_id: int) -> dict[str, Any]:
    """A definition as it was before `json_with_bos`."""
    processor, template = definition.get("post_processor"), _bos_template(bos, bos_id)
    if processor == template:
        return definition | {"post_processor": None}
    if processor and processor.get("type") == "Sequence" and processor.get("processors", [])[1:] == [template]:
        return definition | {"post_processor": processor["processors"][0]}
    return definition


def _bos_template(bos: str, bos_id: int) -> dict[str, Any]:
    def piece(kind: str, name: str, part: int) -> dict[str, Any]:
        return {kind: {"id": name, "type_id": part}}

    first, second = ([piece("SpecialToken", bos, part), piece("Sequence", name, part)]
                     for part, name in enumerate("AB"))
    return {"type": "TemplateProcessing", "single": first, "pair": first + second,
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}}


def _tokenizer_file(path: Path) -> Path:
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise DataError(f"tokenizer {path}: the folder holds no tokenizer.json; give the path of the "
                            "file")
        return path / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"tokenizer {path}: no such file; give the path of a tokenizer.json")
    return path


def _read_definition(path: Path) -> dict[str, Any]:
    try:
        definition = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
        raise DataError(f"{path}: not valid JSON ({_one_line(error)}); is it a tokenizer.json?") from None
    if not isinstance(definition, dict) or not isinstance(definition.get("model"), dict):
        raise DataError(f"{path}: not a tokenizer.json (it has no \"model\"); give the `tokenizers` "
                        "library's file")
    return definition


def _read_config(folder: Path) -> dict[str, Any]:
    path, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config: Any = {}
    try:
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({_one_line(error)}); correct or remove it") from None
    config = config if isinstance(config, dict) else {}
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8", errors="replace")
    return config


def _from_hub(name: str) -> Tokenizer:
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(name, "tokenizer.json"))
    except Exception as error:  # offline, no such repository, gated, …: all the same to the caller
        raise DataError(f"tokenizer {name!r}: no such file here, and the Hub gave no tokenizer.json "
                        f"({type(error).__name__}: {_one_line(error)}); check the name and the connection, "
                        "or give a path or \"bytes\"") from None
    try:
        config = _read_config(Path(hf_hub_download(name, "tokenizer_config.json")).parent)
    except DataError:
        raise
    except Exception:  # optional: the usual names are tried without it
        config = {}
    return tokenizer_from_json(_read_definition(path), name, config)


def _short_name(path: Path) -> str:
    return path.resolve().parent.name if path.name == "tokenizer.json" else path.stem


def _piece_bytes(token: str) -> int:
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
        return 1  # SentencePiece byte fallback
    return len(token.removeprefix("##").replace("▁", " ").encode("utf-8"))


def _check_ids(ids: Iterable[int], vocab_size: int) -> np.ndarray:
    ids_T = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64).reshape(-1)
    if ids_T.size and (ids_T.min() < 0 or ids_T.max() >= vocab_size):
        at = int(np.argmax((ids_T < 0) | (ids_T >= vocab_size)))
        raise DataError(f"decode: id {ids_T[at]} at position {at} is outside the vocabulary [0, "
                        f"{vocab_size}); use the tokenizer that made these ids")
    return ids_T


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"encode: character {error.start} is the lone surrogate "
                        f"U+{ord(text[error.start]):04X}, which UTF-8 cannot hold; remove it or read with "
                        "encoding_errors = \"replace\"") from None


def _canonical(definition: dict[str, Any]) -> str:
    # Keys of the vocabulary keep no order of their own, so sorting loses nothing.
    return json.dumps(definition, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _fingerprint(definition: dict[str, Any], bos_id: int, eos_id: int) -> str:
    return hashlib.sha256(f"{_canonical(definition)}\n{bos_id} {eos_id}".encode()).hexdigest()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
