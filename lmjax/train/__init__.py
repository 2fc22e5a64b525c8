"""Training: `loop` is the loop, top to bottom; the other files are its pieces."""

from lmjax.train.loop import train
from lmjax.train.words import dry_run

__all__ = ["dry_run", "train"]
