"""`lmjax chat` and `lmjax serve`: their flags, and putting the parts together. JAX is imported after parsing."""

import argparse
import contextlib
import ipaddress
import signal
import socket
import sys
from pathlib import Path

from lmjax.decode.flags import add_cache, add_sampling, cache_of, sample_of
from lmjax.errors import ConfigError, DataError
from lmjax.records import printable

LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
MODEL = "a run folder, a Hugging Face folder or a GGUF file"


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"lmjax {command}", description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--step", type=int, default=0, help="another checkpoint of a run than the newest")
    parser.add_argument("--dtype", default="", help="float32 or bfloat16 (default: the run's; float32 for others)")
    parser.add_argument("--template", default="", metavar="FILE", help="a Jinja chat template in place of the model's")
    parser.add_argument("--context", type=int, default=0, metavar="N",
                        help="tokens that a conversation or text may have (default: the model's max_seq_len)")
    return parser


def run_chat(args: list[str]) -> int:
    parser = _parser("chat", """Talk with a model, by its own chat template. /help tells the commands. Ctrl-C stops an
answer, Ctrl-D ends. Turns that no longer fit are forgotten, the oldest first, and that is told.""")
    parser.add_argument("--system", default="", metavar="TEXT", help="what the model is told before all turns")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of an answer (default 512)")
    parser.add_argument("--seed", type=int, default=0)
    # Small models lose the thread when it is hot, and go in circles when it is cold.
    add_sampling(parser, temperature=0.3, stop_loops=4)
    add_cache(parser)
    options = parser.parse_args(args)
    sample, cache = sample_of(options), cache_of(options)
    problems = sample.problems("chat")
    if not 0 <= options.seed < 2**32:
        problems.append(f"--seed {options.seed}: must be from 0 to 2^32 - 1")
    if problems:
        raise ConfigError(*problems)
    from lmjax.interop.load import open_model
    from lmjax.runs import all_devices
    from lmjax.serve.chat import Chat, piped_lines, terminal_lines
    from lmjax.serve.engine import Engine

    opened = open_model(options.model, mesh=all_devices(), dtype=options.dtype, step=options.step)
    opened.encode("")  # says it now if there is no tokenizer
    template = _template(opened, options.template)
    engine = Engine(opened, slots=1, context=options.context, max_queue=1, chunk=1, cache=cache,
                    stop_ids=template.turn_ends)

    def say(text: str) -> None:
        print(text, end="", flush=True)

    say(f"--- {printable(opened.name)} ---\n")
    chat = Chat(engine, template, sample, say, opened.name, options.seed, options.system)
    engine.start()
    try:
        chat.run(terminal_lines() if sys.stdin.isatty() else piped_lines(sys.stdin, say))
    finally:
        engine.stop()
    return 0


def run_serve(args: list[str]) -> int:
    parser = _parser("serve", """Serve a model over HTTP, as OpenAI's endpoints: /v1/completions and
/v1/chat/completions, streamed or not. Requests are decoded together as they come. Fields, limits and what is safe:
docs/serving.md. SIGTERM finishes what was begun and ends.""")
    group = parser.add_argument_group("where, and who may ask")
    group.add_argument("--host", default="127.0.0.1", help="the address to listen on; any but this machine's own needs "
                       "--api-key-file (default %(default)s)")
    group.add_argument("--port", type=int, default=8000, help="0 for any that is free (default %(default)s)")
    group.add_argument("--api-key-file", default="", metavar="FILE", help="holds the key that clients must send")
    group.add_argument("--allow-host", action="append", default=[], metavar="NAME",
                       help="a further name of this server in the Host header (repeatable)")
    group.add_argument("--name", default="", help="by which clients call the model (default: the path's last part)")
    group.add_argument("--access-log", action="store_true", help="a line for each request")
    group = parser.add_argument_group("limits")
    group.add_argument("--slots", type=int, default=8, metavar="N", help="texts decoded together (default %(default)s)")
    group.add_argument("--max-queue", type=int, default=256, metavar="N",
                       help="texts that may wait; more are told to come back, with status 429 (default %(default)s)")
    group.add_argument("--chunk", type=int, default=4, metavar="N",
                       help="tokens between two looks at the queue and the clients (default %(default)s)")
    group.add_argument("--time-limit", type=float, default=600, metavar="SECONDS",
                       help="for a request, waiting included (default %(default)g)")
    group.add_argument("--max-body-bytes", type=int, default=1 << 20, metavar="BYTES", help="default %(default)s")
    group.add_argument("--drain", type=int, default=30, metavar="SECONDS",
                       help="for requests that SIGTERM finds at work (default %(default)s)")
    add_cache(parser)
    options = parser.parse_args(args)
    api_key = _api_key(options)
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ConfigError(f"lmjax serve needs the package {error.name}; pip install 'lmjax[serve]'") from None
    with _listening(options.host, options.port) as listener:
        served = _served(options)
        served.engine.warm_up()
        from lmjax.serve.app import make_app

        app = make_app(served, api_key=api_key, hosts=_hosts(options))
        _many_files()
        host, port = listener.getsockname()[:2]
        where, only = f"[{host}]" if ":" in host else host, "" if served.template else ", no chat template"
        print(f"{served.name}: http://{where}:{port}/v1 ({options.slots} slots, context {served.engine.context}{only})",
              flush=True)
        served.engine.start()
        signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn drains, then raises it again: that is no failure
        config = uvicorn.Config(app, log_level="info" if options.access_log else "warning", lifespan="off",
                                access_log=options.access_log, server_header=False, ws="none",
                                timeout_graceful_shutdown=options.drain)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            served.engine.stop()
    return 0


def _served(options: argparse.Namespace):
    from lmjax.interop.load import open_model
    from lmjax.runs import all_devices
    from lmjax.serve.engine import Engine
    from lmjax.serve.protocol import Limits
    from lmjax.serve.served import Served

    opened = open_model(options.model, mesh=all_devices(), dtype=options.dtype, step=options.step)
    opened.encode("")  # says it now if there is no tokenizer
    template, why = None, ""
    try:
        template = _template(opened, options.template)
    except DataError as error:
        if options.template or opened.tokenizer.chat_template:
            raise
        why = f"this model has no chat template; ask /v1/completions, or start the server with --template ({error})"
    engine = Engine(opened, slots=options.slots, context=options.context, max_queue=options.max_queue,
                    chunk=options.chunk, cache=cache_of(options), stop_ids=template.turn_ends if template else ())
    limits = Limits(body_bytes=options.max_body_bytes, rows=min(64, options.max_queue), seconds=options.time_limit)
    name = options.name or Path(options.model).expanduser().resolve().stem
    return Served(opened, engine, name, template, why, limits)


def _template(opened, path: str):
    """The model's template, or that of a file. Raises DataError."""
    from lmjax.data.chat import ChatTemplate

    if not path:
        return ChatTemplate(opened.tokenizer)
    try:
        source = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise DataError(f"--template {path}: cannot be read ({why}); give a Jinja file") from None
    if not source.strip():
        raise DataError(f"--template {path}: is empty; give a Jinja file")
    return ChatTemplate(opened.tokenizer, source)


def _api_key(options: argparse.Namespace) -> str:
    """The key of the file, "" without one. Raises ConfigError for numbers that cannot be and for an open door."""
    bad = [f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least {low}" for name, low in (
        ("port", 0), ("time_limit", 0.001), ("max_body_bytes", 1), ("drain", 0)) if not getattr(options, name) >= low]
    if options.port > 65535:
        bad.append(f"--port {options.port}: must be at most 65535")
    if not options.api_key_file and not is_loopback(options.host):
        bad.append(f"--host {options.host}: others could use the model; give --api-key-file FILE too, or stay with "
                   "127.0.0.1")
    if bad:
        raise ConfigError(*bad)
    if not options.api_key_file:
        return ""
    try:
        key = Path(options.api_key_file).expanduser().read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not ASCII"
        raise ConfigError(f"--api-key-file {options.api_key_file}: cannot be read ({why})") from None
    if len(key) < 8 or len(key.split()) != 1:
        raise ConfigError(f"--api-key-file {options.api_key_file}: must hold one key of at least 8 characters, without "
                          "spaces")
    return key


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _hosts(options: argparse.Namespace) -> frozenset[str]:
    """The names in the Host header that are let in; none named for a wildcard address: any, since the key is asked."""
    named = frozenset(name.lower() for name in options.allow_host)
    if options.host in ("0.0.0.0", "::") and not named:
        return frozenset()
    return named | LOCAL | {options.host.lower()}


@contextlib.contextmanager
def _listening(host: str, port: int):
    """A socket that listens at the address, so that it is known at once if another has it, and nobody who reads where
    the server is gets there too early: connections wait until uvicorn takes them."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                                             flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, proto)
        with contextlib.closing(listener):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(address)
                listener.listen(2048)
            except OSError as error:
                raise ConfigError(f"--host {host} --port {port}: {error.strerror}; choose another") from None
            yield listener
    except socket.gaierror as error:
        raise ConfigError(f"--host {host}: {error.strerror}; give an address of this machine") from None


def _many_files() -> None:
    """As many connections as the system allows: the usual limit of 1,024 open files is low for a server."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and (hard == resource.RLIM_INFINITY or soft < hard):
        wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
