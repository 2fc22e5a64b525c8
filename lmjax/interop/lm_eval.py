"""EleutherAI's lm-eval harness on any model that `lmjax.load` opens, as its model class "lmjax".

    python -m lmjax.interop.lm_eval run --model lmjax --model_args path=runs/quickstart --tasks … --batch_size 8

Importing this module registers the class; run as above it is the harness's own command line. Needs the extra "eval".
Requests are scored as the harness's Hugging Face backend scores them, but text that spells a special token stays
ordinary text, in the messages of a chat (`--apply_chat_template`) too. Tasks and metrics are the harness's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lmjax.axes import MeshConfig, batch_sharding, make_mesh
from lmjax.data.chat import GUARD, ChatTemplate
from lmjax.decode.generate import SampleConfig, generate
from lmjax.errors import ConfigError
from lmjax.interop.load import open_model

BUCKET = 64  # rows are padded to a multiple, so that few lengths are compiled


@functools.partial(jax.jit, static_argnames="graphdef")
def _score(params, tokens_BT, targets_BT, scored_BT, *, graphdef) -> tuple[jax.Array, jax.Array]:
    """(sum of log-probabilities [B], whether every scored target is the likeliest token [B])."""
    logits_BTV = nnx.merge(graphdef, params)(tokens_BT)
    chosen_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), targets_BT[..., None], axis=-1)[..., 0]
    likeliest_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
    return jnp.sum(chosen_BT * scored_BT, axis=1), jnp.all(likeliest_BT | ~scored_BT, axis=1)


@register_model("lmjax")
class HarnessModel(TemplateLM):
    """path: a run folder, Hugging Face folder or GGUF file. step, dtype: as in `lmjax.load`. batch_size: rows at a
    time, rounded up to the devices. max_length: of a row; 0 for the model's own. max_gen_toks: new tokens where a task
    does not say."""

    def __init__(self, path: str, step: int = 0, dtype: str = "", batch_size: int | str = 8, max_length: int = 0,
                 max_gen_toks: int = 256, device: str | None = None, max_batch_size: int | None = None):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"batch_size={batch_size!r}: give a whole number of rows")
        if device is not None:
            raise ConfigError(f"device={device!r}: JAX uses the devices that it finds; set JAX_PLATFORMS instead")
        self._mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
        self._opened = open_model(path, mesh=self._mesh, dtype=dtype, step=step)
        self._opened.encode("")  # says it now if there is no tokenizer
        self.tokenizer = self._opened.tokenizer
        self.max_length = max_length or self._opened.config.max_seq_len
        self.max_gen_toks = max_gen_toks
        self.batch_size = -(-int(batch_size) // self._mesh.size) * self._mesh.size

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.fingerprint

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The model's template, for the harness's books. Raises ConfigError for the name of another one."""
        if isinstance(chat_template, str):
            raise ConfigError(f"apply_chat_template={chat_template!r}: a model has one template here; give no name")
        return self._template.source if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the template writes it. Its first character, GUARD, tells `tok_encode` to parse specials,
        and further ones keep those that messages spell from being parsed."""
        return GUARD + self._template.render(chat_history, continue_last=not add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if string.startswith(GUARD):
            return self._template.encode(string).tolist()  # the template has put bos where it belongs
        ids = self.tokenizer.encode(string).tolist()
        return ids if add_special_tokens is False else [*self._opened.prefix_ids, *ids]

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        """(log-probability, is greedy) of each continuation; the longest rows come first."""
        results: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for start in range(0, len(order), self.batch_size):
            rows = order[start:start + self.batch_size]
            pairs = [((requests[i][1] + requests[i][2])[-self.max_length - 1:], len(requests[i][2])) for i in rows]
            for i, answer in zip(rows, self._score(pairs), strict=True):
                results[i] = answer
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
        return [results[i] for i in range(len(requests))]

    def _score(self, pairs: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Of rows (ids, how many of the last ones are scored), the first being the longest."""
        width = min(-(-(len(pairs[0][0]) - 1) // BUCKET) * BUCKET, self.max_length)
        tokens, targets = (np.zeros((self.batch_size, width), np.int32) for _ in range(2))
        scored = np.zeros((self.batch_size, width), bool)
        for row, (ids, count) in enumerate(pairs):
            end = len(ids) - 1
            tokens[row, :end], targets[row, :end] = ids[:-1], ids[1:]
            scored[row, end - count:end] = True
        with jax.set_mesh(self._mesh):
            placed = jax.device_put((tokens, targets, scored), batch_sharding(self._mesh))
            sums, greedy = _score(self._opened.params, *placed, graphdef=self._opened.graphdef)
        return [(float(s), bool(g)) for s, g in zip(np.asarray(sums), np.asarray(greedy), strict=True)][:len(pairs)]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, each token predicted once, from windows as full as the model takes."""
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            answers = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows])
            totals.append(sum(answer for answer, _ in answers))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first stop string."""
        texts: dict[int, str] = {}
        groups: dict[SampleConfig, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._sample_config(dict(request.args[1])), []).append(i)
        for config, rows in groups.items():
            room = self.max_length - config.max_new_tokens
            if room < 1:
                raise ConfigError(f"max_gen_toks={config.max_new_tokens} leaves no room for a prompt in rows of "
                                  f"{self.max_length} tokens; lower it")
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start:start + self.batch_size]
                prompts = [np.array(self.tok_encode(requests[i].args[0]) or [self.prefix_token_id], np.int32)[-room:]
                           for i in batch]
                ends = self._template.turn_ends if requests[batch[0]].args[0].startswith(GUARD) else ()
                for i, text in zip(batch, self._generate(prompts, config, ends), strict=True):
                    stops = requests[i].args[1].get("until") or []
                    for stop in [stops] if isinstance(stops, str) else stops:
                        text = text.split(stop)[0] if stop else text
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return [texts[i] for i in range(len(requests))]

    def _generate(self, prompts: list[np.ndarray], config: SampleConfig, ends: tuple[int, ...] = ()) -> list[str]:
        with jax.set_mesh(self._mesh):
            outs = generate(self._opened.graphdef, self._opened.params, prompts, config, key=jax.random.key(0),
                            vocab_size=self.tokenizer.vocab_size, eos_id=self.tokenizer.eos_id, stop_ids=ends)
        return [self.tokenizer.decode(out) for out in outs]

    def _sample_config(self, wanted: dict) -> SampleConfig:
        """A task's `generation_kwargs`. Raises ConfigError for one that we do not have."""
        wanted.pop("until", None)
        sampled = wanted.pop("do_sample", wanted.get("temperature", 0) > 0)
        new = [wanted.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens",
                                                   "max_completion_tokens")]
        config = SampleConfig(
            max_new_tokens=next((int(n) for n in new if n is not None), self.max_gen_toks),
            temperature=float(wanted.pop("temperature", 1.0)) if sampled else 0.0,
            top_k=int(wanted.pop("top_k", 0)), top_p=float(wanted.pop("top_p", 1.0)))
        wanted.pop("temperature", None)
        if problems := config.problems("generation_kwargs") + [
                f"generation_kwargs.{name}={value!r}: is not supported by lmjax's model class; leave it out"
                for name, value in wanted.items()]:
            raise ConfigError(*problems)
        return config


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
