"""The data room: text to tokenizers to token shards to batches that are a pure function of (seed, step).

What lives here: the public names of the room. NumPy and Grain only; nothing here imports JAX, and Grain is
imported when the first `Batches` is made.
"""

from lmjax.data.canaries import Canary, CanaryConfig
from lmjax.data.inject import Injection
from lmjax.data.manifest import Manifest, load_manifest
from lmjax.data.mixture import Batches, Corpus, DataConfig, SourceUse, prepare_all, validation_batches
from lmjax.data.prepare import Progress, prepare
from lmjax.data.protect import Protect
from lmjax.data.rows import Rows
from lmjax.data.shards import Tokens
from lmjax.data.sources import Document, SourceConfig, documents, source_key
from lmjax.data.tokenizers import ByteTokenizer, HFTokenizer, Tokenizer, load_tokenizer, train_bpe

__all__ = [
    "Batches", "ByteTokenizer", "Canary", "CanaryConfig", "Corpus", "DataConfig", "Document", "HFTokenizer",
    "Injection", "Manifest", "Progress", "Protect", "Rows", "SourceConfig", "SourceUse", "Tokenizer", "Tokens",
    "documents", "load_manifest", "load_tokenizer", "prepare", "prepare_all", "source_key", "train_bpe",
    "validation_batches",
]
