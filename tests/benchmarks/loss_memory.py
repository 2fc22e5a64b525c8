"""Now `lmjax bench loss`; this path keeps working, with the vocabulary that the README speaks of."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lmjax.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["bench", "loss", *(sys.argv[1:] or ["--vocab=131072", "--chunk-mib=64"])]))
