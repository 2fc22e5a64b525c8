"""What an audit has done so far, as files: a kill costs the batch that was being worked on, and no bit.

Each batch of work is one .npz file in OUT/parts, written beside and renamed. The identity of the audit (weights, texts,
settings) stands in OUT/parts/audit.json: parts of another audit are refused, never mixed.
"""

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmjax.errors import ConfigError
from lmjax.records import replace_file
from lmjax.tree import named_leaves

Arrays = dict[str, np.ndarray]


class Parts:
    """The finished batches of one audit. Raises ConfigError where the folder is of another."""

    def __init__(self, out: Path, identity: dict[str, Any]):
        if out.exists() and not out.is_dir():
            raise ConfigError(f"--folder {out}: is a file; give a folder")
        self.folder = out / "parts"
        path, text = self.folder / "audit.json", json.dumps(identity, indent=1, sort_keys=True) + "\n"
        if path.is_file():
            if (found := path.read_text(encoding="utf-8", errors="replace")) != text:
                raise ConfigError(f"--folder {out}: holds another audit ({_differs(found, identity)}); give another "
                                  "folder, or remove this one")
        elif out.is_dir() and any(out.iterdir()) and not self.folder.is_dir():
            raise ConfigError(f"--folder {out}: holds other files; give a new folder")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, text.encode())

    def get(self, name: str) -> Arrays | None:
        """The arrays of a batch, or None where it has to be done."""
        try:
            with np.load(self.folder / f"{name}.npz") as file:
                return {key: file[key] for key in file.files}
        except (OSError, ValueError, zipfile.BadZipFile, EOFError, KeyError):
            return None

    def put(self, name: str, arrays: Arrays) -> Arrays:
        """Keeps the arrays of a batch; gives them back."""
        data = io.BytesIO()
        np.savez(data, **arrays)
        replace_file(self.folder / f"{name}.npz", data.getvalue())
        return arrays


def _differs(found: str, identity: dict[str, Any]) -> str:
    try:
        old = json.loads(found)
        names = [name for name in sorted({*old, *identity}) if old.get(name) != identity.get(name)]
    except (ValueError, TypeError):
        return "its parts/audit.json cannot be read"
    return f"its {', '.join(names)} differ" if names else "its parts/audit.json was changed by hand"


def weights_hash(params: Any) -> str:
    """sha256 hex of the names, types and bytes of all weights."""
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(params).items()):
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.view(np.uint8).reshape(-1) if array.ndim else array.tobytes())
    return digest.hexdigest()


def texts_hash(*texts: str) -> str:
    """sha256 hex of texts and their boundaries."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(f"{len(data)} ".encode() + data)
    return digest.hexdigest()
