"""Reading a config.json so that no setting passes unseen.

Every key is taken by the family that knows it; what nobody took, and does not stand in INERT, is refused by name:
a setting that we do not know may change the numbers. All problems of a file are found before any is told.
"""

from typing import Any

# Keys that change no logit: who wrote the file, how it was trained, how transformers runs it, which ids the tokenizer
# gives a meaning to, defaults of sampling. Names that begin with "_" are transformers' own notes.
INERT = frozenset("""
    architectures model_type transformers_version torch_dtype dtype use_cache initializer_range gradient_checkpointing
    attention_dropout resid_pdrop embd_pdrop attn_pdrop hidden_dropout bos_token_id eos_token_id pad_token_id
    unk_token_id sep_token_id decoder_start_token_id summary_type summary_use_proj summary_activation
    summary_proj_to_labels summary_first_dropout task_specific_params n_ctx reorder_and_upcast_attn pretraining_tp
    is_decoder is_llama_config transformers.js_config cache_implementation output_attentions output_hidden_states
    return_dict use_return_dict torchscript chunk_size_feed_forward problem_type id2label label2id num_labels
    finetuning_task prefix tokenizer_class do_sample temperature top_k top_p typical_p max_length min_length num_beams
    repetition_penalty unsloth_version unsloth_fixed
""".split())

# Keys that say something about the whole folder, and what to do.
REFUSED = {
    "quantization_config": "its weights are quantised; give the unquantised model, or a GGUF file",
    "compression_config": "its weights are compressed; give the unquantised model, or a GGUF file",
    "auto_map": "it needs code that comes with the model, which is never run; give a family of docs/interop.md",
}


class Settings:
    """The keys of a config.json (or of a section of one), to be taken by name. null is None, and so is a key that is
    neither there nor in `defaults`.

    Each method gives a value of its type, and notes a problem where there is none: `or_` stands for null.
    """

    def __init__(self, values: dict[str, Any], defaults: dict[str, Any] | None = None, prefix: str = ""):
        self.values = {**(defaults or {}), **values}
        self.prefix = prefix
        self.problems: list[str] = []
        self._taken: set[str] = set()

    def _take(self, key: str, types: tuple[type, ...], what: str, or_: Any) -> Any:
        self._taken.add(key)
        value = self.values.get(key)
        if value is None and or_ is not None:
            return or_
        if type(value) not in types:
            self.problem(key, f"expected {what}")
            return types[0]()
        return value

    def int(self, key: str, or_: int | None = None) -> int:
        return self._take(key, (int,), "a whole number", or_)

    def float(self, key: str, or_: float | None = None) -> float:
        return float(self._take(key, (float, int), "a number", or_))

    def bool(self, key: str, or_: bool | None = None) -> bool:
        return self._take(key, (bool,), "true or false", or_)

    def one_of(self, key: str, meanings: dict[str, Any]) -> Any:
        """What the text means, of those that are known."""
        value = self._take(key, (str,), "a name", None)
        if value and value not in meanings:
            self.problem(key, f"is not supported; supported are {', '.join(meanings)}")
        return meanings.get(value, next(iter(meanings.values())))

    def section(self, key: str) -> "Settings":
        """An object within the file; empty where it is null. Its problems are noted here, when it is `done`."""
        section = Settings(self._take(key, (dict,), "an object", {}), prefix=f"{self.prefix}{key}.")
        section.problems = self.problems
        return section

    def strings(self, key: str, or_: list[str]) -> list[str]:
        return self._take(key, (list,), "a list of names", or_)

    def must_be(self, key: str, value: Any) -> None:
        """The key is absent, null or has the one value that we can express."""
        self._taken.add(key)
        if self.values.get(key) not in (None, value):
            self.problem(key, f"is not supported, only {value!r} is")

    def unused(self, *keys: str) -> None:
        """Keys that have no effect with the others as they are."""
        self._taken |= set(keys)

    def problem(self, key: str, what: str) -> None:
        self.problems.append(f"{self.prefix}{key}={self.values.get(key)!r}: {what}")

    def done(self) -> None:
        """Notes every key that nobody took."""
        for key, value in self.values.items():
            if key in self._taken or key in INERT or key.startswith("_"):
                continue
            if key in REFUSED:
                if value:
                    self.problems.append(f"{self.prefix}{key}: {REFUSED[key]}")
            elif value is not None:
                self.problem(key, "is a setting that lmjax does not know, so what it changes would be lost; remove it "
                                  "from the file if it changes no number")
