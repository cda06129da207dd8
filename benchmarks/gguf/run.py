"""Compare llama.cpp on exports to GGUF with Fira on the runs that they were made of.

python benchmarks/gguf/run.py runs/mooshak-tiny runs/rish-olmoe-tiny --text corpus.txt

Needs `pip install xllamacpp`. Windows of the model's context less one token are taken from the text at equal distances.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from llama_logits import predictions, start  # noqa: E402

from fira import load_model  # noqa: E402
from fira.huggingface.export_model import export, gguf_path  # noqa: E402
from fira.nn.context import Context  # noqa: E402

TYPES = ("f16", "q8_0", "q4_0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    head = ("run", "type", "bytes", "positions", "equal top 1", "perplexity", "in Fira", "change")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for run in options.runs:
        model = load_model(run)
        length = model.config.seq_len - 1
        ids = np.array(model.tokenizer.encode(options.text.read_text()).ids)
        windows = ids[: len(ids) // length * length].reshape(-1, length)
        windows = windows[np.linspace(0, len(windows) - 1, options.windows).astype(int)]
        with torch.inference_mode():
            logits = model(torch.from_numpy(windows), Context())[:, :-1].double()
        tops = logits.argmax(-1).numpy()
        ours = logits.log_softmax(-1).gather(-1, torch.from_numpy(windows)[:, 1:, None])[..., 0].numpy()
        for kind in TYPES:
            with tempfile.TemporaryDirectory() as folder:
                path = gguf_path(export(run, Path(folder) / run.name, "gguf", kind), kind)
                server = start(path, length + 1)
                theirs = np.stack([predictions(server, row) for row in windows.tolist()])
                size = path.stat().st_size
            used = ~np.isnan(theirs[..., 1])
            equal = (theirs[..., 0] == tops)[used].mean()
            found, expected = np.exp(-theirs[used][:, 1].mean()), np.exp(-ours[used].mean())
            row = (run.name, kind, f"{size:,}", f"{used.sum():,}", f"{equal:.2%}", f"{found:.3f}", f"{expected:.3f}")
            print(f"| {' | '.join(row)} | {found / expected - 1:+.3%} |", flush=True)


if __name__ == "__main__":
    main()
