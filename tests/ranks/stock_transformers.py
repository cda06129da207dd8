"""Load exported folders with transformers in a process that cannot import this project.

`run_isolated` starts this file as `python -I -S stock_transformers.py SITE_PACKAGES RESULTS FOLDER…`.
"""

import json
import os
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CONVERSATION = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "no"},
]
IDS = range(5, 17)


def run_isolated(results: Path, *folders: Path) -> dict[str, dict[str, Any]]:
    """Load each folder, save and load its model twice more, and return what the last copy generates.

    The logits for the tokens `IDS` are written to `results/<name>.npy`.

    Returns:
        By the folder's name: `single` and `batch`, greedy continuations of text prompts; `greedy`, six token ids that
        follow the first four of `IDS`; `chat`, a formatted conversation; `classes`, the model's class and package.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-S", __file__, sysconfig.get_path("purelib"), str(results), *map(str, folders)],
        env=environment | {"HF_HOME": str(results / "huggingface"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main(site: str, results: str, *folders: str) -> None:
    sys.path.append(site)  # does not read .pth files, which may contain paths of checkouts
    assert find_spec("fira") is None
    assert find_spec("pipeline") is None

    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    found = {}
    for folder in map(Path, folders):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        for copy in (Path(results, "copy", folder.name), Path(results, "copy-of-copy", folder.name)):
            model.save_pretrained(copy)  # with its code
            model = AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True)
        for parameter in model.parameters():
            # Loaded weights are views of the file. Sums in a product depend on the alignment of its operands, at least
            # with MKL on AMD processors, and a copy is aligned as the weights in a training process are.
            parameter.data = parameter.data.clone()
        ids = torch.tensor([[*IDS]])
        with torch.no_grad():
            np.save(Path(results, folder.name), model(ids).logits[0].numpy())
        generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
        greedy = {"do_sample": False, "max_new_tokens": 4}
        found[folder.name] = {
            "single": generate("def f", **greedy)[0]["generated_text"],
            "batch": [one[0]["generated_text"] for one in generate(["def f", "import a b c"], batch_size=2, **greedy)],
            "greedy": model.generate(ids[:, :4], max_new_tokens=6, do_sample=False)[0].tolist(),
            "chat": tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True),
            "classes": [type(model).__name__, type(model).__module__.split(".")[0]],
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
