"""The flags of sampling and of the key/value cache, which `lmjax generate`, `chat` and `serve` share.

Only argparse is imported here, so that `--help` never waits for JAX.
"""

import argparse


def add_sampling(parser: argparse.ArgumentParser, temperature: float = 0.8, stop_loops: int = 0) -> None:
    """One flag for each field of SampleConfig but max_new_tokens; `sample_of` reads them. temperature, stop_loops:
    defaults."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=temperature, help="0 is greedy (default %(default)s)")
    group.add_argument("--top-k", type=int, default=0, help="the k likeliest tokens; 0 keeps all (default %(default)s)")
    group.add_argument("--top-p", type=float, default=0.95,
                       help="the likeliest tokens that make up probability p; 1 keeps all (default %(default)s)")
    group.add_argument("--min-p", type=float, default=0.0,
                       help="tokens at least p times as likely as the likeliest; 0 keeps all (default %(default)s)")
    group.add_argument("--typical", type=float, default=1.0, dest="typical_p", metavar="P",
                       help="the tokens of most typical surprise that make up p; 1 keeps all (default %(default)s)")

    group = parser.add_argument_group("against repetition")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R",
                       help="divides positive logits of tokens seen, multiplies negative ones (default %(default)s)")
    group.add_argument("--frequency-penalty", type=float, default=0.0, metavar="F",
                       help="off a token's logit for each time it was generated (default %(default)s)")
    group.add_argument("--presence-penalty", type=float, default=0.0, metavar="F",
                       help="off a token's logit once it was generated (default %(default)s)")
    group.add_argument("--no-repeat-ngram", type=int, default=0, metavar="N",
                       help="no N tokens in a row occur twice; 0 lets them (default %(default)s)")
    group.add_argument("--dry", type=float, default=0.0, dest="dry_multiplier", metavar="M",
                       help="what prolonging a repetition costs; 0 is nothing, 0.8 usual (default %(default)s)")
    group.add_argument("--dry-base", type=float, default=1.75, metavar="B",
                       help="times this for each token that the repetition is longer (default %(default)s)")
    group.add_argument("--dry-allowed-length", type=int, default=2, metavar="N",
                       help="repetitions shorter than this are free (default %(default)s)")
    group.add_argument("--stop-loops", type=int, default=stop_loops, metavar="N",
                       help="end a text whose end has gone round one cycle N times; 0 goes on (default %(default)s)")
    group.add_argument("--loop-period", type=int, default=64, metavar="N",
                       help="tokens of the longest cycle that --stop-loops looks for (default %(default)s)")


def add_cache(parser: argparse.ArgumentParser) -> None:
    """The fields of CacheConfig; `cache_of` reads them."""
    group = parser.add_argument_group("key/value cache")
    group.add_argument("--cache-dtype", default="", metavar="DTYPE",
                       help="float32, bfloat16 or int8 (default: the model's compute dtype)")
    group.add_argument("--cache-window", type=int, default=0, metavar="N",
                       help="every layer sees the last N tokens only, in memory of N tokens; 0 is all")
    group.add_argument("--sinks", type=int, default=0, metavar="N",
                       help="layers with a window also see the first N tokens (default %(default)s)")


def sample_of(options: argparse.Namespace):
    """The SampleConfig of flags, `--max-new-tokens` among them."""
    from lmjax.decode.processors import SampleConfig

    return SampleConfig(**{name: getattr(options, name) for name in SampleConfig.__dataclass_fields__})


def cache_of(options: argparse.Namespace):
    from lmjax.nn.cache import CacheConfig

    return CacheConfig(options.cache_dtype, options.cache_window, options.sinks)
