"""Serve a trained model over HTTP, with OpenAI's API and a page to chat in a browser."""

import logging
import os
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from fira import cli
from fira.errors import UserError
from fira.generation.options import add_checkpoint, add_quantize
from fira.value_types import NotNegative, Port, Size, Steps, flag_type

KEY_VARIABLE = "FIRA_API_KEY"

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = cli.Parser(__doc__, prog)
    add_arguments(parser)
    options = parser.start(arguments)
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"serve needs the package {error.name}; pip install -e '.[serve]'") from None
    serve(options)


def add_arguments(parser: cli.Parser) -> None:
    add_checkpoint(parser)
    add_quantize(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address; 0.0.0.0: all networks (default: %(default)s)")
    parser.add_argument("--port", type=flag_type(Port), default=8000, help="0: a free one (default: %(default)s)")
    key_help = f"required from clients; default: the variable {KEY_VARIABLE}, which other users cannot see, or none"
    parser.add_argument("--api-key", metavar="KEY", default=os.environ.get(KEY_VARIABLE), help=key_help)
    parser.add_argument("--rows", type=Size, default=32, help="texts generated at a time (default: %(default)s)")
    queue_help = "further texts that can wait; others get status 429 (default: %(default)s)"
    parser.add_argument("--queue", type=flag_type(Steps), default=128, help=queue_help)
    wait_help = "seconds for running answers after SIGTERM or Ctrl-C (default: %(default)s)"
    parser.add_argument("--shutdown-seconds", type=flag_type(NotNegative), default=30.0, help=wait_help)
    cors_help = "a page of this origin may send requests from a browser (CORS); repeatable; default: none"
    parser.add_argument("--cors-origin", action="append", default=[], metavar="URL", help=cors_help)


def serve(options: Namespace) -> None:
    """Load the model, and serve it until a signal."""
    import torch

    from fira.commands.loading import load
    from fira.files import one_line
    from fira.models.registry import build
    from fira.serving.app import create_app
    from fira.serving.http_server import is_loopback, listen, run_server, url
    from fira.serving.scheduler import Scheduler
    from fira.serving.served_model import ServedModel

    key = options.api_key
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise UserError(
            f"--api-key, or {KEY_VARIABLE}: the key is empty or has other characters than ASCII ones; change it"
        )
    listening = listen(options.host, options.port)
    model = load(options.checkpoint, options.tokenizer, options.quantize, options.quiet)
    served = ServedModel(model, name_of(options.checkpoint), options.rows)
    scheduler = Scheduler(model, options.rows, options.queue)
    try:
        memory = scheduler.warm_up()
    except RuntimeError as error:  # torch cannot allocate the key-value cache
        raise UserError(f"--rows {options.rows}: {one_line(error)}; give a smaller number") from None
    address = url(listening)
    with torch.device("meta"):
        parameters = build(model.config).num_parameters()
    if not key and not is_loopback(listening):
        logger.warning("--host %s without --api-key: everyone in the network can use the model", options.host)
    logger.info("serving %s (%s parameters); chat in a browser: %s/", served.name, f"{parameters:,}", address)
    logger.info(
        "limits: %d texts at a time, %d waiting, %d tokens per text; cache of %.0f MB",
        *(options.rows, options.queue, served.context, memory / 1e6),
    )
    logger.info("next: %s", example(address, served.has_chat, bool(key)))
    run_server(create_app(served, scheduler, key, options.cors_origin), scheduler, listening, options.shutdown_seconds)
    logger.info("the server has ended")


def example(address: str, chat: bool, key: bool) -> str:
    """A command that sends a request to the server."""
    known = f'\'"${KEY_VARIABLE}"' if os.environ.get(KEY_VARIABLE) else "KEY'"
    header = f"-H 'Authorization: Bearer {known} " if key else ""
    path = "chat/completions" if chat else "completions"
    body = '{"messages": [{"role": "user", "content": "Hello"}]}' if chat else '{"prompt": "Hello"}'
    return f"curl {address}/v1/{path} {header}-H 'Content-Type: application/json' -d '{body}'"


def name_of(checkpoint: str) -> str:
    """The name of the model in the API: that of the run or of the exported folder."""
    path = Path(checkpoint).resolve()
    folders = [path, *path.parents]
    above = [folder.parent for folder in folders if folder.name == "checkpoints"]
    return (above or folders)[0].name
