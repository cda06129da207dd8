"""What a stock transformers makes of exported folders, in a process that cannot import this project.

    python -I -S stock_transformers.py SITE_PACKAGES RESULTS FOLDER…

Writes to RESULTS, a folder, `<name>.npy` with each model's logits for the tokens 5, 6, …, 13, and prints as JSON what
each wrote as a pipeline and how its tokenizer puts a conversation.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

site, results, *folders = sys.argv[1:]
sys.path.append(site)  # without its .pth files, which lead to checkouts
assert find_spec("fira") is None
assert find_spec("pipeline") is None

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline  # noqa: E402

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "no"}]
said = {}
for folder in map(Path, folders):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        np.save(Path(results, folder.name), model(torch.arange(5, 14)[None]).logits[0].numpy())
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    greedy = {"do_sample": False, "max_new_tokens": 4}
    said[folder.name] = {
        "alone": write("def f", **greedy)[0]["generated_text"],
        "batch": [one[0]["generated_text"] for one in write(["def f", "import a b c"], batch_size=2, **greedy)],
        "talk": tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True),
        "classes": [type(model).__name__, type(model).__module__.split(".")[0]],
    }
print(json.dumps(said))
