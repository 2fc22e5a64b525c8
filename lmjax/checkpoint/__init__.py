"""Checkpoints: `store` saves and restores, `manifest` says what is whole, `fingerprint` what the arrays are."""

from lmjax.checkpoint.store import (
    CheckpointConfig,
    Checkpoints,
    abstract,
    differences,
    flatten,
    quiet_storage,
    save_json,
    versions,
)

__all__ = ["CheckpointConfig", "Checkpoints", "abstract", "differences", "flatten", "quiet_storage", "save_json",
           "versions"]
