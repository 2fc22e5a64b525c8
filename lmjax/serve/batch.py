"""A batch whose rows come and go: the device's side of continuous batching, without threads, clocks or text.

The batch is one `decode.generate.State` of `slots` rows. A new row is prefilled alone, by the same `_prefill`, and
copied into a free slot; `_advance` then runs all of them for a few steps. A row's tokens are those of `generate` for
its prompt, settings and key alone, whatever its neighbours (up to rounding, as said there).

Few programs are compiled. Prompts are padded to powers of two. The room S of the batch doubles when a row comes near
its end. Of the processors, families are compiled in and not each combination (`Needs`); neutral settings make them do
nothing for rows that did not ask. Room and families only grow while any row is there, and start anew when none is.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmjax.decode.generate import Program, State, _advance, _prefill, cast_once, row_keys
from lmjax.decode.loops import no_loops
from lmjax.decode.processors import Active, History, SampleConfig, active, settings_of
from lmjax.models.cached import new_cache
from lmjax.nn.cache import CacheConfig

MIN_ROOM, MIN_PROMPT = 256, 16
TOP_LOGPROBS = 20  # as many as a request may ask for; fewer are cut from these


@dataclasses.dataclass(frozen=True)
class Needs:
    """Families of processors in the compiled program."""

    sample: bool = False  # temperature, top-k, top-p, min-p
    typical: bool = False
    history: bool = False  # repetition, frequency and presence penalties, no-repeat n-gram, DRY
    logprobs: bool = False
    bias: bool = False
    loops: int = 0  # the longest cycle that some row is stopped for

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(*(max(a, b) for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @property
    def active(self) -> Active:
        h, s = self.history, self.sample
        return Active(repetition=h, counts=h, ngram=h, dry=h, sample=s, top_k=s, top_p=s, min_p=s,
                      typical=self.typical, loops=self.loops)


@dataclasses.dataclass
class Row:
    """What a row is made of, and what has become of it. prompt: int32 ids. index: of the row within its request
    (see `row_keys`). bias: added to logits, by id. The lists grow with the new tokens, the stop token included."""

    prompt: np.ndarray
    config: SampleConfig
    seed: int = 0
    index: int = 0
    logprobs: bool = False
    bias: dict[int, float] = dataclasses.field(default_factory=dict)
    tokens: list[int] = dataclasses.field(default_factory=list)
    token_logprobs: list[float] = dataclasses.field(default_factory=list)
    top_ids: list[np.ndarray] = dataclasses.field(default_factory=list)
    top_logprobs: list[np.ndarray] = dataclasses.field(default_factory=list)
    done: bool = False
    bad: bool = False  # its logits were not finite
    looped: bool = False  # ended because it went round in circles

    @property
    def needs(self) -> Needs:
        c = self.config
        return Needs(c.temperature > 0, c.temperature > 0 and c.typical_p < 1,
                     c.repetition_penalty != 1 or c.frequency_penalty != 0 or c.presence_penalty != 0
                     or c.no_repeat_ngram > 0 or c.dry_multiplier > 0, self.logprobs, bool(self.bias),
                     active([c]).loops)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)


NOBODY = SampleConfig(max_new_tokens=1, temperature=0.0, top_p=1.0)  # the settings of a free slot


class Batch:
    """`slots` rows of up to `context` tokens, prompt and new ones. stop_ids end any row.

    breakers: gives the ids over which DRY sees no repetition; called when a row first has a history.
    Used by one thread, inside `jax.set_mesh` where the weights are sharded. After an exception the rows are lost:
    `clear` before the next use.
    """

    def __init__(self, graphdef: nnx.GraphDef, params, *, slots: int, context: int, vocab_size: int,
                 stop_ids: Sequence[int], cache: CacheConfig | None = None,
                 breakers: Callable[[], Sequence[int]] = lambda: ()):
        model = nnx.merge(graphdef, params)
        self._model_config, self._dtype = model.config, model.compute.dtype
        self._graphdef, self._cache = graphdef, cache or CacheConfig()
        self._params, self._prepared = cast_once(graphdef, params)
        self._vocab, self._stops = vocab_size, np.array(stop_ids, np.int32)
        self._most_room = -(-context // 16) * 16 + 16
        self._find_breakers = breakers
        self.rows: list[Row | None] = [None] * slots
        self.clear()

    def clear(self) -> None:
        """Frees every slot and the memory of the batch."""
        self.rows = [None] * len(self.rows)
        self._state: State | None = None
        self._needs, self._room = Needs(), 0
        self._host_settings = settings_of([NOBODY] * len(self.rows))
        self._settings: dict | None = None  # on the device
        self._bias_BV: jax.Array | None = None
        self._stopped = np.zeros(len(self.rows), bool)

    @property
    def free(self) -> list[int]:
        return [slot for slot, row in enumerate(self.rows) if row is None]

    @property
    def room(self) -> int:
        """Tokens that a row of the batch has room for now; 0 without rows."""
        return self._room

    def admit(self, row: Row) -> int:
        """Prefills a row, whose first token it then has, and gives it a free slot, unless it is done already (-1)."""
        T = min(_power_of_two(max(len(row.prompt), MIN_PROMPT)), self._most_room - 16)
        self._make_room(len(row.prompt) + 1, row.needs)
        tokens = np.zeros((1, T), np.int32)
        tokens[0, :len(row.prompt)] = row.prompt
        settings = settings_of([row.config])
        if self._needs.bias:
            settings["logit_bias"] = self._bias_row(row)[None]
        lengths, key = np.array([len(row.prompt)], np.int32), _key(np.uint32(row.seed), np.uint32(row.index))
        state = _prefill(self._params, self._prepared, tokens, lengths, key, settings, self._stops, self._breakers(),
                         program=self._program(T + 16))
        self._take(state, [row], 1)
        if row.done:
            if not any(self.rows):
                self.clear()
            return -1
        slot = self.free[0]
        self.rows[slot], self._stopped[slot] = row, False
        self._state = _insert(self._state, state, np.int32(slot))
        for name, values in self._host_settings.items():
            values[slot] = settings[name][0]
        self._settings = None
        if self._needs.bias:
            self._bias_BV = self._bias_BV.at[slot].set(settings["logit_bias"][0])
        return slot

    def advance(self, steps: int) -> None:
        """Up to `steps` new tokens for every row. Rows that are done stay in their slots until `release`."""
        live = [row for row in self.rows if row is not None and not row.done]
        if not live:
            return
        self._make_room(min(max(row.length for row in live) + steps, self._most_room), Needs())
        if self._settings is None:
            self._settings = jax.device_put({name: values.copy() for name, values in self._host_settings.items()})
        settings = self._settings | ({"logit_bias": self._bias_BV} if self._needs.bias else {})
        state = dataclasses.replace(self._state, step=np.int32(0))
        self._state = _advance(self._params, self._prepared, state, self._stopped.copy(), np.int32(steps), settings,
                               self._stops, self._breakers(), program=self._program(self._room))
        self._take(self._state, self.rows, steps)

    def release(self, slot: int) -> None:
        """Frees a slot, whether its row is done or not."""
        self.rows[slot], self._stopped[slot] = None, True
        for name, value in settings_of([NOBODY]).items():
            self._host_settings[name][slot] = value[0]
        self._settings = None
        if not any(self.rows):
            self.clear()

    # ---- inside ----------------------------------------------------------------------------------------

    def _program(self, room: int) -> Program:
        top = min(TOP_LOGPROBS, self._vocab) if self._needs.logprobs else -1
        return Program(self._graphdef, self._needs.active, self._cache, self._vocab, room, top)

    def _make_room(self, room: int, needs: Needs) -> None:
        """The state with room for rows of so many tokens, and with what the needs carry along."""
        room = max(self._room, min(_power_of_two(max(room, MIN_ROOM)), self._most_room))
        needs = self._needs | needs
        if self._state is not None and (room, needs) == (self._room, self._needs):
            return
        if needs.bias and self._bias_BV is None:
            self._bias_BV = jnp.zeros((len(self.rows), self._model_config.vocab_size))
        self._room, self._needs = room, needs
        self._state = _resized(self._state, program=self._program(room), rows=len(self.rows),
                               config=self._model_config, dtype=self._dtype)

    def _bias_row(self, row: Row) -> np.ndarray:
        bias_V = np.zeros(self._model_config.vocab_size, np.float32)
        for token, value in row.bias.items():
            bias_V[token] = value
        return bias_V

    def _breakers(self) -> np.ndarray | None:
        return self._breakers_V if self._needs.history else None

    @functools.cached_property
    def _breakers_V(self) -> np.ndarray:
        breakers_V = np.zeros(self._model_config.vocab_size, bool)
        breakers_V[list(self._find_breakers())] = True
        return breakers_V

    def _take(self, state: State, rows: Sequence[Row | None], width: int) -> None:
        """Gives each row what it has new, at most `width` tokens. Waits for the device."""
        known = np.array([row.length if row else 0 for row in rows], np.int32)
        wanted = [state.tokens_BS, state.lengths_B, state.done_B, state.bad_B]
        if self._needs.logprobs:
            wanted += _tail(state.logprob_BN, state.top_ids_BNC, state.top_logprob_BNC, known, width=width)
        looped = jax.device_get(state.loops.looped_B) if self._needs.loops else np.zeros(len(rows), bool)
        tokens, lengths, done, bad, *scores = jax.device_get(wanted)
        for i, row in enumerate(rows):
            if row is None or row.done:
                continue
            count = int(lengths[i]) - row.length
            row.tokens += tokens[i, row.length:lengths[i]].tolist()
            row.done, row.bad, row.looped = bool(done[i]), bool(bad[i]), bool(looped[i])
            if row.logprobs:
                for held, new in zip((row.token_logprobs, row.top_ids, row.top_logprobs), scores, strict=True):
                    held += list(new[i, :count])


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


# ---- The compiled part -----------------------------------------------------------------------------------


@jax.jit
def _key(seed: jax.Array, index: jax.Array) -> jax.Array:
    """The key of one row, [1]."""
    return row_keys(jax.random.key(seed), index[None])


@functools.partial(jax.jit, static_argnames=("program", "rows", "config", "dtype"))
def _resized(state: State | None, *, program: Program, rows: int, config, dtype: str) -> State:
    """An empty state of a program; with what another one holds, where one is given."""
    B, S, n = rows, program.slots, program.logprobs
    N, uses = S if n >= 0 else 0, program.active
    zeros, off = functools.partial(jnp.zeros, dtype=jnp.int32), jnp.zeros(B, bool)
    history = History(jnp.zeros((B, config.vocab_size), bool) if uses.repetition else None,
                      zeros((B, config.vocab_size)) if uses.counts else None, zeros((B, S)) if uses.ngram else None,
                      zeros((B, S)) if uses.dry else None) if uses.history else None
    empty = State(zeros(()), zeros((B, S)), zeros(B), zeros(B), ~off, off, jax.random.split(jax.random.key(0), B),
                  new_cache(config, dtype, B, S, program.cache), history,
                  no_loops(B, min(uses.loops, S)) if uses.loops else None, jnp.zeros((B, N)),
                  zeros((B, N, max(n, 0))), jnp.zeros((B, N, max(n, 0))))
    if state is None:
        return empty
    held = _by_path(state)
    return jax.tree_util.tree_map_with_path(
        lambda path, new: _over(new, held[_name(path)]) if _name(path) in held else new, empty)


@functools.partial(jax.jit, donate_argnames="state")
def _insert(state: State, one: State, slot: jax.Array) -> State:
    """The state with the only row of another one in a slot. All of the slot is written: what a former row has left,
    were it NaN, would be multiplied by weights of zero, which is NaN."""
    given = _by_path(one)

    def put(path, x):
        if x.ndim == 0:
            return x
        axis = 1 if "_LB" in _name(path) else 0  # the layers of a cache come before its rows
        row = _over(jnp.zeros_like(jax.lax.slice_in_dim(x, 0, 1, axis=axis)), given[_name(path)])
        return jax.lax.dynamic_update_slice_in_dim(x, row, slot, axis)

    return jax.tree_util.tree_map_with_path(put, state)


def _over(new: jax.Array, old: jax.Array) -> jax.Array:
    """`new` with as much of `old` as there is room for, from the first index of each axis on.

    A cache's slot of a position is the same in any room that the position fits in, rings included.
    """
    block = old[tuple(slice(0, min(a, b)) for a, b in zip(new.shape, old.shape, strict=True))]
    return new if 0 in block.shape else jax.lax.dynamic_update_slice(new, block, (0,) * new.ndim)


def _by_path(state: State) -> dict[str, jax.Array]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _name(path) -> str:
    return jax.tree_util.keystr(path)


@functools.partial(jax.jit, static_argnames="width")
def _tail(*arrays_and_from_B: jax.Array, width: int) -> list[jax.Array]:
    """Of arrays [B, N, …], `width` entries of each row from an index on."""
    *arrays, from_B = arrays_and_from_B
    at_BC = jnp.minimum(from_B[:, None] + jnp.arange(width), arrays[0].shape[1] - 1)
    return [x[jnp.arange(x.shape[0])[:, None], at_BC] for x in arrays]
