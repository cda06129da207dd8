"""Tiny Shakespeare as characters: token ids in the shards that train.py reads."""

from pathlib import Path

import numpy as np

TRAINING_SHARE = 0.9


def write_shards(text: Path, folder: Path) -> int:
    """Write the first 90 % of the characters as training tokens, the others as validation tokens.

    Return the number of different characters, which are numbered in the order of their code points.
    """
    characters = text.read_text(encoding="utf-8")
    alphabet = sorted(set(characters))
    numbers = {character: number for number, character in enumerate(alphabet)}
    ids = np.array([numbers[character] for character in characters], dtype=np.uint16)
    split = int(TRAINING_SHARE * len(ids))
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "shakespeare_train_000.npy", ids[:split])
    np.save(folder / "shakespeare_val_000.npy", ids[split:])
    return len(alphabet)
