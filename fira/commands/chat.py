"""Chat with a trained model.

/reset clears the conversation, /help prints this text, /quit or Ctrl-D ends, Ctrl-C interrupts an answer.
"""

import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fira import cli
from fira.generation.options import add_checkpoint, add_quantize, add_sampling, sampling

if TYPE_CHECKING:
    from fira.generation.conversation import Conversation


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = cli.Parser(__doc__, prog)
    add_checkpoint(parser)
    parser.add_argument("--max-new-tokens", type=int, default=200, help="longest answer (default: %(default)s)")
    add_sampling(parser)
    add_quantize(parser)
    options = parser.start(arguments)
    from fira.commands.loading import load
    from fira.generation.conversation import Conversation

    model = load(options.checkpoint, options.tokenizer, options.quantize, options.quiet)
    answer_questions(Conversation(model), options)


def answer_questions(conversation: "Conversation", options: Namespace) -> None:
    """Read questions from a terminal, or one per line from a pipe, and print each answer while it is generated."""
    terminal = sys.stdin.isatty()
    if terminal and not options.quiet:
        print(__doc__, file=sys.stderr)
    while True:
        try:
            question = input("> " if terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if question == "/quit":
            break
        if question == "/reset":
            conversation.reset()
        elif re.match(r"/\w+(\s|$)", question):  # /help, or a command that does not exist
            print(__doc__, file=sys.stderr)
        elif question:
            cli.print_pieces(conversation.ask(question, options.max_new_tokens, **sampling(options)))
