"""Records of chat data as messages, in the formats of TRL and of Alpaca.

| fields of a record              | messages                                              | trained             |
|---------------------------------|-------------------------------------------------------|---------------------|
| messages                        | as they are                                           | all answers         |
| prompt, completion              | lists of messages, or the text of a user and an answer | those of completion |
| instruction, input, output      | instruction and input, separated by a new line; output | output              |
| prompt (optional), chosen, rejected | two chats: prompt + chosen, prompt + rejected     | chosen and rejected |

An answer is a message of the assistant. A list may also be given as JSON text, for CSV: in a field that may be a text
as well, JSON is a list of messages if each of its entries has a role.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fira.data.chat_template import Chat, Message
from fira.data.compression import Advance
from fira.data.readers import Record, has_reader, read_records, valid_text
from fira.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
FORMS = (("messages",), ("prompt", "completion"), ("instruction", "output"))
PYTHON_MESSAGES = re.compile(r"\s*\[\s*\{\s*'(role|content)'\s*:")  # as the to_csv of pandas and datasets writes them
FORMATS = "messages, prompt and completion, or instruction and output"


def read_chats(files: Sequence[Path], advance: Advance) -> Iterator[Chat]:
    """Yield the chats of all files. Raises UserError, which names file and row, if a record is not a chat."""
    return _read(files, advance, to_chat)


def contains_chats(files: Sequence[Path]) -> bool:
    """Whether the first file is a table whose first record has the fields of a chat."""
    if not files or not has_reader(files[0]):
        return False
    _, first = next(read_records(files[0], lambda _: None), ("", {}))
    fields = _present(first).keys()
    return any(form <= fields for form in ({"messages"}, {"prompt", "completion"}, {"instruction", "output"}))


def read_preferences(files: Sequence[Path], advance: Advance) -> Iterator[tuple[Chat, Chat]]:
    """Yield pairs of chats with the chosen and the rejected answer; see `read_chats`."""
    return _read(files, advance, to_preference)


def _read(files: Sequence[Path], advance: Advance, convert: Callable[[Record, str], Any]) -> Iterator[Any]:
    found = False
    for path in files:
        for where, record in read_records(path, advance):
            found = True
            yield convert(record, where)
    if not found:
        raise UserError(f"{', '.join(map(str, files))}: contains no example; give a file with at least one row")


def to_chat(record: Record, where: str) -> Chat:
    """Return a record as a chat. where: its place, for messages. Raises UserError unless it is one, with an answer."""
    fields = _present(record)
    forms = [form for form in FORMS if set(form) <= fields.keys()]
    if len(forms) > 1:  # as in a table with the columns of several forms, of which a row fills one
        forms = [form for form in forms if any(fields[name] != "" for name in form)] or forms[:1]
    if len(forms) > 1:
        raise UserError(f"{where}: has {' as well as '.join(map(' and '.join, forms))}; keep one of them")
    tools = _parsed(fields.get("tools") or None, f"{where}: tools")
    form: tuple[str, ...] = forms[0] if forms else ()
    context = 0
    if "messages" in form:
        messages = to_messages(_parsed(fields["messages"], f"{where}: messages"), "", f"{where}: messages")
    elif "completion" in form:
        prompt = to_messages(fields["prompt"], "user", f"{where}: prompt")
        completion = to_messages(fields["completion"], "assistant", f"{where}: completion")
        messages, context = prompt + completion, _answers(prompt)
    elif "instruction" in form:
        texts = [_text(fields, name, where) for name in ("instruction", "input") if name in fields]
        messages = to_messages([{"role": "user", "content": "\n".join(filter(None, texts))}], "", where)
        answer = {"role": "assistant", "content": _text(fields, "output", where)}
        messages += to_messages([answer], "", f"{where}: output")
    elif {"chosen", "rejected"} <= fields.keys():
        raise UserError(f"{where}: preference data, with chosen and rejected; give records with {FORMATS}")
    else:
        raise UserError(f"{where}: has {_listed(fields)}; give records with {FORMATS}")
    return _chat(messages, context, tools, where)


def to_preference(record: Record, where: str) -> tuple[Chat, Chat]:
    """Return a record as the chats with the chosen and the rejected answer.

    Without `prompt`, the messages with which both begin are the prompt.
    """
    fields = _present(record)
    if not {"chosen", "rejected"} <= fields.keys():
        raise UserError(f"{where}: has {_listed(fields)}; give records with prompt, chosen and rejected")
    tools = _parsed(fields.get("tools") or None, f"{where}: tools")
    prompt = to_messages(fields["prompt"], "user", f"{where}: prompt") if "prompt" in fields else []
    chosen = to_messages(fields["chosen"], "assistant", f"{where}: chosen")
    rejected = to_messages(fields["rejected"], "assistant", f"{where}: rejected")
    if chosen == rejected:
        raise UserError(f"{where}: chosen and rejected are equal; remove the record")
    if not prompt:
        while chosen and rejected and chosen[0] == rejected[0]:
            prompt.append(chosen.pop(0))
            rejected.pop(0)
    context = _answers(prompt)
    if not prompt:
        raise UserError(f"{where}: no prompt; give one, or messages with which chosen and rejected begin")
    return _chat(prompt + chosen, context, tools, where), _chat(prompt + rejected, context, tools, where)


def _present(record: Record) -> Record:
    """Return a record without the empty cells of a table, and without the cells beyond the header of a CSV file."""
    return {key: value for key, value in record.items() if key is not None and value is not None}


def _listed(fields: Record) -> str:
    return f"the fields {', '.join(map(repr, fields))}" if fields else "no fields"


def _text(fields: Record, name: str, where: str) -> str:
    if not isinstance(text := fields[name], str):
        raise UserError(f"{where}: {name} is {type(text).__name__}, not text; correct the record")
    return text


def _parsed(value: Any, where: str) -> Any:
    """Return a value that is JSON text, as in CSV, as the list that it denotes."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: invalid JSON ({error}); correct it") from None


def to_messages(value: Any, role: str, where: str) -> list[Message]:
    """Return messages in the form that templates expect: a list, or the text of one message of this role.

    role: "" allows a list only. Raises UserError, which begins with `where`, for anything else.
    """
    if isinstance(value, str) and PYTHON_MESSAGES.match(value):
        raise UserError(f"{where}: messages in Python's notation, not JSON; write them with json.dumps")
    if isinstance(value, str) and role:
        value = _listed_messages(value) or [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise UserError(f"{where}: {type(value).__name__}, not a list of messages; give a role and content each")
    if not value:
        raise UserError(f"{where}: no message; give at least one")
    return [_message(entry, f"{where}, message {number}") for number, entry in enumerate(value, 1)]


def _listed_messages(text: str) -> list[Any] | None:
    """Return the messages that a text denotes as JSON; None if it is any other text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if all(isinstance(entry, dict) and "role" in entry for entry in value) else None


def _message(entry: Any, where: str) -> Message:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: {type(entry).__name__}, not an object; give a role and content")
    message = {key: value for key, value in entry.items() if value is not None}
    if "role" not in message:
        raise UserError(f"{where}: no role; give one of {', '.join(ROLES)}")
    if message["role"] not in ROLES:
        raise UserError(f"{where}: unknown role {str(message['role'])[:80]!r}; give one of {', '.join(ROLES)}")
    content = message.get("content", "" if message.get("tool_calls") else None)
    if not isinstance(content, str):
        raise UserError(f"{where}: content is {type(content).__name__}, not text; correct the record")
    if message["role"] == "assistant" and not content.strip() and not message.get("tool_calls"):
        raise UserError(f"{where}: empty answer; correct or remove the record")
    return message | {"content": valid_text(content)}


def _answers(messages: Sequence[Message]) -> int:
    return sum(message["role"] == "assistant" for message in messages)


def _chat(messages: list[Message], context: int, tools: Any, where: str) -> Chat:
    if _answers(messages) == context:
        raise UserError(f"{where}: no answer; give a message with the role assistant")
    if not isinstance(tools, list | None):
        raise UserError(f"{where}: tools is {type(tools).__name__}, not a list; correct the record")
    return Chat(messages, context, tools, where)
