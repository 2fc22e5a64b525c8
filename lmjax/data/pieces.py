"""The bytes of single tokens, for log-probabilities shown token by token.

Text of several tokens is `Tokenizer.decode`'s business: characters may span tokens, and spaces may be dropped.
"""

import json
import re

from lmjax.data.tokenizers import Tokenizer, _byte_letters


def token_pieces(tokenizer: Tokenizer) -> list[bytes]:
    """UTF-8 bytes of every id; specials give their name. Ids that stand for nothing give b""."""
    definition = json.loads(tokenizer.to_json())
    added = {token["id"]: token["content"] for token in definition.get("added_tokens", [])}
    vocab = definition["model"]["vocab"]
    # A unigram vocabulary is a list of [piece, score], the others map pieces to ids.
    pairs = vocab.items() if isinstance(vocab, dict) else ((piece, i) for i, (piece, _) in enumerate(vocab))
    byte_level = '"ByteLevel"' in json.dumps([definition.get("decoder"), definition.get("pre_tokenizer")])
    byte_of = {letter: byte for byte, letter in enumerate(_byte_letters())}
    pieces = [b""] * tokenizer.vocab_size
    for piece, i in pairs:
        if byte_level and all(letter in byte_of for letter in piece):
            pieces[i] = bytes(byte_of[letter] for letter in piece)
        elif found := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
            pieces[i] = bytes([int(found[1], 16)])
        else:
            pieces[i] = piece.replace("▁", " ").encode()
    for i, content in added.items():
        pieces[i] = content.encode()
    return pieces
