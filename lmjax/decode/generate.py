"""Generation: prefill a key/value cache with the prompts, then one compiled loop over new tokens.

    complete   everything about each row: tokens, why it ended, log-probabilities, text
    generate   the tokens alone
    stream     the same tokens, in pieces as they are made

All three run the same two programs, `_prefill` and `_advance`, over one `State`. A row's tokens are a function of
its prompt, its settings and its key, whatever else is in the batch and wherever it stands in it (up to rounding:
matrix products of another batch size may round otherwise, by about 1e-7). What lives here: the loop, and the host's
side of it: lengths, stop strings, checks. How a token is chosen is `lmjax.decode.processors`.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmjax.axes import constrain
from lmjax.decode import watermark as watermarks
from lmjax.decode.loops import Loops, count_loops, no_loops
from lmjax.decode.marks import Watermark
from lmjax.decode.processors import (
    Active,
    History,
    SampleConfig,
    active,
    choose,
    penalise,
    remember,
    remember_prompt,
    settings_of,
)
from lmjax.errors import ConfigError, DataError, NonFiniteError
from lmjax.models import DecoderConfig
from lmjax.models.cached import Prepared, last_hidden, layers_apart, matmul_weights, next_logits
from lmjax.nn.cache import Cache, CacheConfig

CHUNK = 16  # steps between two looks of the host, where it has to look: streaming and stop strings


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """All that a generation carries from one token to the next.

    tokens_BS holds each row's prompt and then its new tokens, lengths_B of them; the cache holds all but the last.
    A row that is done stays as it is. S is the text's room, N = S where log-probabilities are wanted, else 0.
    """

    step: jax.Array  # int32 scalar: new tokens of the rows that are not done
    tokens_BS: jax.Array
    starts_B: jax.Array  # int32: length of the prompt
    lengths_B: jax.Array  # int32: prompt and new tokens
    done_B: jax.Array  # bool: has ended by a stop token, by its limit, or by the host's wish
    bad_B: jax.Array  # bool: its logits were not finite
    keys_B: jax.Array  # PRNG key of the row; the n-th new token is drawn with fold_in(key, n)
    cache: Cache
    history: History | None  # of the penalties
    loops: Loops | None  # of rows that are stopped when they loop
    logprob_BN: jax.Array  # float32: of each new token, before any processor; by index in tokens_BS
    top_ids_BNC: jax.Array
    top_logprob_BNC: jax.Array


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled program depends on, beside shapes."""

    graphdef: nnx.GraphDef
    active: Active
    cache: CacheConfig
    vocab_size: int
    slots: int
    logprobs: int  # -1: none; n >= 0: of the chosen token and of the n likeliest


@dataclasses.dataclass
class Completion:
    """What became of one prompt.

    tokens: new ones, without the stop token. finish: "stop" (a stop token), "string" (a stop string), "loop" (the end
    went round a cycle; all of it is in `tokens`), "length" or "" (still going). text: set where the caller gave
    `text_of`, and cut before the stop string; `tokens` then end with the token that completed it. logprobs [n]: natural
    logarithms under the model itself, before penalties, temperature and filters; top_ids and top_logprobs [n, top]
    likewise.
    """

    tokens: np.ndarray
    finish: str
    text: str | None = None
    logprobs: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None


def bucket(n: int) -> int:
    """n rounded up so that few different lengths are ever compiled: multiples of 16, then four sizes an octave."""
    step = max(16, 2 ** ((max(n, 1) - 1).bit_length() - 3))
    return -(-n // step) * step


def row_keys(key: jax.Array, rows: Sequence[int]) -> jax.Array:
    """The key of each row: fold_in(key of the request's seed, the row's index within its request)."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.asarray(rows, jnp.uint32))


# ---- The compiled part ---------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="program")
def _prefill(params, prepared: Prepared, tokens_BT, lengths_B, keys_B, settings, stop_ids, breakers_V, *,
             program: Program) -> State:
    """The state after the first new token of each row."""
    model = nnx.merge(program.graphdef, params)
    B, T = tokens_BT.shape
    S, n = program.slots, program.logprobs
    hidden, cache = model.extend(tokens_BT, lengths_B, model.new_cache(B, S, program.cache), empty=True)
    tokens_BS = jnp.zeros((B, S), jnp.int32).at[:, :T].set(tokens_BT)
    history = None
    if program.active.history:
        history = remember_prompt(program.active, tokens_BS, lengths_B, T, model.config.vocab_size, breakers_V)
    off, N = jnp.zeros(B, bool), S if n >= 0 else 0
    top = (B, N, max(n, 0))
    loops = no_loops(B, min(program.active.loops, S)) if program.active.loops else None
    state = State(jnp.zeros((), jnp.int32), tokens_BS, lengths_B, lengths_B, off, off, keys_B, cache, history, loops,
                  jnp.zeros((B, N)), jnp.zeros(top, jnp.int32), jnp.zeros(top))
    x_BD = last_hidden(hidden, lengths_B)
    return _choose_next(model, prepared.head_VD, x_BD, state, settings, stop_ids, breakers_V, program)


@functools.partial(jax.jit, static_argnames="program", donate_argnames="state")
def _advance(params, prepared: Prepared, state: State, stopped_B, until, settings, stop_ids, breakers_V, *,
             program: Program) -> State:
    """Steps until there are `until` new tokens or every row is done. stopped_B: rows that the host has ended."""
    model = nnx.merge(program.graphdef, params)

    def body(state: State) -> State:
        at_B1 = jnp.maximum(state.lengths_B - 1, 0)[:, None]
        last_B1 = jnp.take_along_axis(state.tokens_BS, at_B1, axis=1)
        x_B1D, cache = model.extend(last_B1, (~state.done_B).astype(jnp.int32), state.cache, layers=prepared.layers)
        state = dataclasses.replace(state, cache=cache)
        return _choose_next(model, prepared.head_VD, x_B1D[:, 0], state, settings, stop_ids, breakers_V, program)

    state = dataclasses.replace(state, done_B=state.done_B | stopped_B)
    return jax.lax.while_loop(lambda s: (s.step < until) & ~jnp.all(s.done_B), body, state)


def _choose_next(model, head_VD, x_BD, state: State, settings, stop_ids, breakers_V, program: Program) -> State:
    """Chooses and appends one token to every row that is not done."""
    logits_BV = next_logits(model, x_BD, head_VD)
    # Rows of the output matrix beyond the tokenizer's size stand for nothing.
    if program.vocab_size < logits_BV.shape[1]:
        logits_BV = jnp.where(jnp.arange(logits_BV.shape[1]) < program.vocab_size, logits_BV, -jnp.inf)
    bad_B = state.bad_B | (~state.done_B & ~jnp.isfinite(jnp.max(logits_BV, axis=1)))  # max passes NaN on
    keys_B = jax.vmap(jax.random.fold_in)(state.keys_B, state.lengths_B - state.starts_B)
    penalised_BV = penalise(logits_BV, settings, program.active, state.history, state.tokens_BS, state.lengths_B)
    marker = None
    if program.active.marks:
        marker = watermarks.marker(settings["marks"], program.active.marks, state.tokens_BS, state.starts_B,
                                   state.lengths_B, penalised_BV.shape[1])
    token_B = choose(penalised_BV, settings, program.active, keys_B, marker)

    live_B, rows_B = ~state.done_B, jnp.arange(token_B.shape[0])
    at_B = jnp.where(live_B, state.lengths_B, state.tokens_BS.shape[1])  # writes of rows that are done are dropped
    tokens_BS = state.tokens_BS.at[rows_B, at_B].set(token_B)
    new = {}
    if program.logprobs >= 0:
        logp_BV = jax.nn.log_softmax(logits_BV, axis=1)
        chosen_B = jnp.take_along_axis(logp_BV, token_B[:, None], axis=1)[:, 0]
        new["logprob_BN"] = state.logprob_BN.at[rows_B, at_B].set(chosen_B)
        if program.logprobs:
            top_BC, ids_BC = jax.lax.top_k(logp_BV, program.logprobs)
            new["top_ids_BNC"] = state.top_ids_BNC.at[rows_B, at_B].set(ids_BC)
            new["top_logprob_BNC"] = state.top_logprob_BNC.at[rows_B, at_B].set(top_BC)
    if state.history is not None:
        new["history"] = remember(state.history, tokens_BS, state.lengths_B, token_B, live_B, breakers_V)
    if state.loops is not None:
        new["loops"] = count_loops(state.loops, tokens_BS, state.starts_B, state.lengths_B, token_B, live_B,
                                   settings["stop_loops"], settings["loop_period"])
    lengths_B = state.lengths_B + live_B
    ends_B = jnp.any(token_B[:, None] == stop_ids, axis=1) | (
        lengths_B - state.starts_B >= settings["max_new_tokens"])
    if state.loops is not None:
        ends_B |= new["loops"].looped_B
    return _pinned(dataclasses.replace(state, step=state.step + 1, tokens_BS=tokens_BS, lengths_B=lengths_B,
                                       done_B=state.done_B | bad_B | ends_B, bad_B=bad_B, **new))


def _pinned(state: State) -> State:
    """The state with the sharding of its rows stated; the cache's is stated where it is made."""
    letters = {"tokens_BS": "BS", "starts_B": "B", "lengths_B": "B", "done_B": "B", "bad_B": "B"}
    return dataclasses.replace(state, **{name: constrain(getattr(state, name), to) for name, to in letters.items()})


def cast_once(graphdef: nnx.GraphDef, params) -> tuple[dict, Prepared]:
    """(params, prepared): weights of matrix products in the compute dtype, so that no step casts them again, and what
    else the steps would make of them."""
    dtype, head_VD = nnx.merge(graphdef, params).compute.dtype, None
    if dtype != "float32":
        params, head_VD = _cast(params, graphdef=graphdef)
    return params, Prepared(layers_apart(params["blocks"]), head_VD)


@functools.partial(jax.jit, static_argnames="graphdef")
def _cast(params, *, graphdef):
    model = nnx.merge(graphdef, params)
    dtype = model.compute.dtype
    return matmul_weights(params, dtype), model.head_VD.astype(dtype)


# ---- The host's part -----------------------------------------------------------------------------------


def complete(graphdef: nnx.GraphDef, params, prompts: Sequence[np.ndarray],
             config: SampleConfig | Sequence[SampleConfig], *, key: jax.Array, vocab_size: int, eos_id: int = -1,
             stop_ids: Sequence[int] = (), stop_strings: Sequence[str] = (),
             text_of: Callable[[np.ndarray], str] | None = None, rows: Sequence[int] | None = None,
             cache: CacheConfig | None = None, logprobs: int = -1, dry_breakers: Sequence[int] = (),
             watermark: Watermark | Sequence[Watermark | None] | None = None) -> list[Completion]:
    """Continues every prompt to its end.

    graphdef, params: `nnx.split` of a Decoder, params as pure dictionaries, sharded or not (inside `jax.set_mesh`
    the loop is sharded like them). prompts: token ids, of any lengths, none empty. config: one for all or one a row.
    eos_id and stop_ids end a row (-1: none). stop_strings end it too, once text_of(new tokens) contains one: the host
    looks every CHUNK steps and cuts exactly. key: of the request's seed; rows: each row's index within its
    request, by default 0, 1, …; see `row_keys`. logprobs: -1 for none, n for those of the chosen token and the n
    likeliest. dry_breakers: token ids over which DRY sees no repetition. watermark: one for all or one a row, None for
    a row without; with "gumbel" a new context's token depends on the secret and not on the key.

    Raises DataError for a prompt that is empty, too long for the model or outside the vocabulary, ConfigError for
    settings out of range, NonFiniteError where logits are not finite.
    """
    step = CHUNK if stop_strings else 2**30
    pieces = _pieces(graphdef, params, prompts, config, key, vocab_size, eos_id, stop_ids, stop_strings, text_of,
                     rows, cache, logprobs, dry_breakers, watermark, first=step, step=step)
    return collections.deque(pieces, maxlen=1)[0]


def generate(graphdef: nnx.GraphDef, params, prompts: Sequence[np.ndarray],
             config: SampleConfig | Sequence[SampleConfig], *, key: jax.Array, vocab_size: int, eos_id: int = -1,
             **options) -> list[np.ndarray]:
    """The new tokens of each prompt, without the stop token; arguments and errors are those of `complete`."""
    return [done.tokens for done in complete(graphdef, params, prompts, config, key=key, vocab_size=vocab_size,
                                             eos_id=eos_id, **options)]


def stream(graphdef: nnx.GraphDef, params, prompts: Sequence[np.ndarray],
           config: SampleConfig | Sequence[SampleConfig], *, key: jax.Array, vocab_size: int, eos_id: int = -1,
           stop_ids: Sequence[int] = (), stop_strings: Sequence[str] = (),
           text_of: Callable[[np.ndarray], str] | None = None, rows: Sequence[int] | None = None,
           cache: CacheConfig | None = None, logprobs: int = -1, dry_breakers: Sequence[int] = (),
           watermark: Watermark | Sequence[Watermark | None] | None = None,
           chunk: int = CHUNK) -> Iterator[list[Completion]]:
    """`complete` as it goes: after the first token and then every `chunk` steps, each row's completion so far.

    The last list is what `complete` returns. With stop strings, the text so far leaves out an end that may still
    become one; without, it may end in a character that the next token completes (U+FFFD until then).
    """
    return _pieces(graphdef, params, prompts, config, key, vocab_size, eos_id, stop_ids, stop_strings, text_of, rows,
                   cache, logprobs, dry_breakers, watermark, first=1, step=chunk)


def _pieces(graphdef, params, prompts, config, key, vocab_size, eos_id, stop_ids, stop_strings, text_of, rows, cache,
            logprobs, dry_breakers, watermark, first: int, step: int) -> Iterator[list[Completion]]:
    model = nnx.merge(graphdef, params)  # a view of the same arrays; gives the two configs
    configs = [config] * len(prompts) if isinstance(config, SampleConfig) else list(config)
    cache = cache or CacheConfig()
    check(model.config, prompts, configs, vocab_size, cache, stop_strings, text_of, logprobs)
    marked = [watermark] * len(prompts) if watermark is None or isinstance(watermark, Watermark) else list(watermark)
    if bad := watermarks.problems(marked, [c.temperature for c in configs]):
        raise ConfigError(*bad)
    uses, settings = dataclasses.replace(active(configs), marks=watermarks.marks(marked)), settings_of(configs)
    if uses.marks:
        settings["marks"] = watermarks.settings_of(marked)
    tokens, lengths = padded(prompts)
    most = max(c.max_new_tokens for c in configs)
    program = Program(graphdef, uses, cache, vocab_size, bucket(tokens.shape[1] + most), logprobs)
    stops = np.full(bucket(len(stop_ids) + 1), -1, np.int32)
    stops[:len(stop_ids) + 1] = [eos_id, *stop_ids]
    breakers = None
    if program.active.dry:
        breakers = np.zeros(model.config.vocab_size, bool)
        breakers[list(dry_breakers)] = True
    params, prepared = cast_once(graphdef, params)
    fixed = (settings, stops, breakers)
    state = _prefill(params, prepared, tokens, lengths, row_keys(key, range(len(prompts)) if rows is None else rows),
                     *fixed, program=program)
    stopped, until = np.zeros(len(prompts), bool), first
    while True:
        if until > 1:
            state = _advance(params, prepared, state, stopped, np.int32(min(until, most)), *fixed, program=program)
        so_far = _read(state, stops, stop_strings, text_of, logprobs)
        yield so_far
        stopped = np.array([done.finish != "" for done in so_far])
        if stopped.all():
            return
        until = until + step if until > 1 else max(step, 2)


def _read(state: State, stops: np.ndarray, stop_strings, text_of, logprobs: int) -> list[Completion]:
    """What the rows are so far. The fetch also waits for the device."""
    tokens, starts, lengths, done, bad = jax.device_get(
        (state.tokens_BS, state.starts_B, state.lengths_B, state.done_B, state.bad_B))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise NonFiniteError(f"row {row}: the logits of new token {lengths[row] - starts[row] - 1} are not finite; the "
                             "weights hold NaN or infinities, or activations overflow; use another checkpoint, or "
                             "compute in float32")
    looped = np.zeros(len(tokens), bool) if state.loops is None else np.asarray(state.loops.looped_B)
    scores = [np.asarray(x) for x in (state.logprob_BN, state.top_ids_BNC, state.top_logprob_BNC)
              ] if logprobs >= 0 else []
    return [_completion(tokens[row], starts[row], lengths[row], done[row], looped[row], stops, stop_strings, text_of,
                        [x[row] for x in scores]) for row in range(len(tokens))]


def _completion(tokens, start, length, done, looped, stops, stop_strings, text_of, scores) -> Completion:
    finish = ("stop" if tokens[length - 1] in stops else "loop" if looped else "length") if done else ""
    end = length - 1 if finish == "stop" else length
    text = None
    if text_of is not None:
        text = text_of(tokens[start:end])
        if (cut := _first(text, stop_strings)) >= 0:
            # Text grows with its tokens, so the token that completes the string is found by halving.
            low, high = start, end
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if _first(text_of(tokens[start:middle]), stop_strings) >= 0 else (
                    middle, high)
            text, end, finish = text[:cut], high, "string"
        elif not finish:
            text = text[:len(text) - _held_back(text, stop_strings)]
    logprobs = [x[start:end] for x in scores] or [None] * 3
    return Completion(tokens[start:end].copy(), finish, text, *logprobs)


def _first(text: str, strings: Sequence[str]) -> int:
    """Where the earliest of the strings begins in the text; -1 where none is."""
    return min((at for string in strings if (at := text.find(string)) >= 0), default=-1)


def _held_back(text: str, strings: Sequence[str]) -> int:
    """How many characters at the end may be the beginning of a stop string."""
    return max((n for string in strings for n in range(1, min(len(string), len(text) + 1))
                if text.endswith(string[:n])), default=0)


def padded(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [B, T], lengths int32 [B]): prompts padded on the right to a bucket."""
    lengths = np.array([len(p) for p in prompts], np.int32)
    tokens = np.zeros((len(prompts), bucket(int(lengths.max()))), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, :len(prompt)] = prompt
    return tokens, lengths


def check(model_config: DecoderConfig, prompts: Sequence[np.ndarray], configs: Sequence[SampleConfig],
          vocab_size: int, cache: CacheConfig | None = None, stop_strings: Sequence[str] = (),
          text_of: Callable | None = None, logprobs: int = -1, what: str = "prompt") -> None:
    """Raises ConfigError or DataError for what a request has wrong, before anything is compiled."""
    bad = cache.problems() if cache else []
    if not len(prompts):
        bad.append(f"{what}s: there are none; give at least one")
    if len(configs) != len(prompts):
        bad.append(f"config: {len(configs)} for {len(prompts)} prompts; give one for all or one for each")
    for c in dict.fromkeys(configs):
        bad += c.problems()
    if stop_strings and text_of is None:
        bad.append("stop_strings need text_of, the tokenizer's decode, to be found")
    if "" in stop_strings:
        bad.append("stop_strings: one is empty and would end every text at once; remove it")
    if not -1 <= logprobs <= vocab_size:
        bad.append(f"logprobs={logprobs}: from 0 to the {vocab_size} tokens of the vocabulary, or -1 for none")
    if bad:
        raise ConfigError(*bad)
    for row, (prompt, c) in enumerate(zip(prompts, configs, strict=True)):
        prompt, length = np.asarray(prompt), len(prompt) + c.max_new_tokens
        if not len(prompt):
            raise DataError(f"{what} {row} is empty; begin it with the tokenizer's bos token")
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            at = int(np.argmax((prompt < 0) | (prompt >= vocab_size)))
            raise DataError(f"{what} {row}: id {prompt[at]} at position {at} is outside the vocabulary [0, "
                            f"{vocab_size}); use the tokenizer that the model was trained with")
        if length > model_config.max_seq_len:
            raise DataError(f"{what} {row}: {len(prompt)} tokens and {c.max_new_tokens} new ones make {length}, and "
                            f"model.max_seq_len is {model_config.max_seq_len}; shorten the prompt or ask for fewer new "
                            "tokens")
