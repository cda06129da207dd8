"""Final answers of worked solutions: the part after the last marker.

text      3+4=7 7-2=5 so 5
marker    "so "                 answer   5
"""


def final_answer(text: str, after: str | None) -> str | None:
    """Return the part of a text after the last occurrence of the marker `after`, without spaces around it.

    None if the text does not contain the marker. after=None: the whole text.
    """
    if after is None:
        return text.strip()
    _, found, answer = text.rpartition(after)
    return answer.strip() if found else None


def same_answer(generated: str, reference: str, after: str | None) -> bool:
    """Whether a generated text has the final answer of a reference text. A text without answer equals no other one."""
    answer = final_answer(generated, after)
    return answer is not None and answer == final_answer(reference, after)
