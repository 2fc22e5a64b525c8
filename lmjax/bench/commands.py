"""The sub-commands of `lmjax bench`, each in a file of its own; nothing is imported before it is asked for."""

from lmjax.errors import ConfigError

USAGE = """usage: lmjax bench COMMAND [options]

  train        train steps against PyTorch, Transformers and MaxText, by turns
  step         where a step's time goes, and how far each part is from its floor
  loss         chunked cross-entropy against the naive one: time and memory
  data         tokens per second through tokenise, prepare, shuffle, pack, load
  start        --help, import, first step, compile time by depth
  checkpoint   how long a save stalls the loop, and a restore
  processes    a step in one process, and in several on the same cores
  decode       greedy decoding with a cache against Transformers
  serve        continuous batching against one request after another

The last line of stdout is one JSON object with everything. `lmjax bench COMMAND --help` says more; how to read the
figures: docs/performance.md.
"""


def run_bench(args: list[str]) -> int:
    """Raises ConfigError for an unknown sub-command or a wrong option."""
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    match args[0]:
        case "train":
            from lmjax.bench.train import run
        case "step":
            from lmjax.bench.step import run
        case "loss":
            from lmjax.bench.loss import run
        case "data":
            from lmjax.bench.data import run
        case "start":
            from lmjax.bench.start import run
        case "checkpoint":
            from lmjax.bench.checkpoint import run
        case "processes":
            from lmjax.bench.processes import run
        case "decode":
            from lmjax.bench.decode import run
        case "serve":
            from lmjax.bench.serve import run
        case other:
            raise ConfigError(f"lmjax bench {other}: no such benchmark; see `lmjax bench --help`")
    return run(args[1:])
