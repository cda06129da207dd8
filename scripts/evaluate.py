"""How well a model predicts files, which experts they go to, and its scores in tasks of EleutherAI's lm-eval."""

from argparse import Namespace
from itertools import chain

from fira import cli, encode, load_model
from fira.data.sources import documents
from fira.data.tokenizer import eos_id, load_tokenizer
from fira.devices import choose_devices
from fira.errors import UserError
from fira.generation.perplexity import TextLoss, perplexity
from fira.generation.text import own_tokenizer
from fira.generation.utilisation import counting_experts, shares
from fira.models.language_model import LanguageModel


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="a run folder, a step folder or an exported folder")
    parser.add_argument("--tokenizer", help="a tokenizer.json; default: the checkpoint's own")
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE", help="text, CSV, JSONL, Parquet, or folders")
    parser.add_argument("--text-column", default="text", help="column or key of the text (default: %(default)s)")
    parser.add_argument("--tasks", default="", help="names of lm-eval tasks, between commas (pip install .[eval])")
    parser.add_argument("--tasks-path", metavar="DIR", help="a folder of task files; default: those of lm-eval")
    parser.add_argument("--limit", type=int, help="examples of each task; default: all")
    parser.add_argument("--batch-size", type=int, default=8, help="examples in a forward (default: %(default)s)")
    options = parser.parse_args()
    if not options.data and not options.tasks:
        raise UserError("there is nothing to evaluate on; give --data or --tasks")
    model = load_model(options.checkpoint, choose_devices("auto", None, 0)[0])
    if options.tokenizer:
        model.tokenizer = load_tokenizer(options.tokenizer)
    if options.data:
        read(model, options)
    if options.tasks:
        solve(model, options)


def read(model: LanguageModel, options: Namespace) -> None:
    """Print the loss on each file, on all of them where they are several, and the experts' shares of them."""
    tokenizer = own_tokenizer(model)
    losses, sizes = [], []
    with counting_experts(model) as counts:
        for file in options.data:
            texts = list(documents(file, options.text_column))
            ids = list(chain.from_iterable([eos_id(tokenizer), *encode(text, tokenizer)] for text in texts))
            losses.append(perplexity(model, ids, progress=True))
            sizes.append(sum(len(text.encode()) for text in texts))
            print(f"{file}: {losses[-1].describe(sizes[-1])}")
    if len(losses) > 1:
        print(f"together: {TextLoss.mean(losses).describe(sum(sizes))}")
    if counts:
        print("tokens that each expert takes, in percent:")
    for layer, parts in shares(counts).items():
        print(f"  layer {layer}: " + " ".join(f"{100 * part:.1f}" for part in parts))


def solve(model: LanguageModel, options: Namespace) -> None:
    """Print the scores in tasks."""
    from fira.huggingface.tasks import evaluate_tasks  # imports transformers

    names = [name.strip() for name in options.tasks.split(",")]
    scores = evaluate_tasks(model, names, options.tasks_path, options.limit, options.batch_size)
    for task, metrics in scores.items():
        print(f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


if __name__ == "__main__":
    cli.run(main)
