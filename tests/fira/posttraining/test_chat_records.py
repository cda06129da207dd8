"""Records of chat data in all formats and files, and the errors that name file and row."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fira.data.chat_template import Chat
from fira.errors import UserError
from fira.posttraining.chat_records import read_chats, read_preferences, to_chat, to_preference

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes, ä"}
PAIR = [USER, ASSISTANT]
RECORDS = [{"messages": PAIR}, {"messages": [{"role": "system", "content": "s"}, *PAIR, *PAIR]}]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    """Write records in the format of the suffix; lists are JSON text in CSV."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, sorted({name for record in records for name in record}))
        writer.writeheader()
        writer.writerows(
            {k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items()} for record in records
        )
        path.write_text(out.getvalue())
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path: Path) -> list[Chat]:
    return list(read_chats([path], lambda _: None))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_messages_are_read_from_every_format(tmp_path: Path, suffix: str) -> None:
    chats = read(write(tmp_path / f"chats{suffix}", RECORDS))
    assert [chat.messages for chat in chats] == [record["messages"] for record in RECORDS]
    rows = {".jsonl": ["line 1", "line 2"], ".csv": ["line 2", "line 3"], ".parquet": ["row 1", "row 2"]}[suffix]
    assert [chat.where for chat in chats] == [f"{tmp_path / 'chats'}{suffix}, {row}" for row in rows]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_lists_of_messages_are_read_from_every_format(tmp_path: Path, suffix: str) -> None:
    records = [{"prompt": [USER], "completion": [ASSISTANT]}]
    (chat,) = read(write(tmp_path / f"chats{suffix}", records))
    assert chat.messages == PAIR
    pairs = [{"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{**ASSISTANT, "content": "No"}]}]
    ((chosen, rejected),) = read_preferences([write(tmp_path / f"pairs{suffix}", pairs)], lambda _: None)
    assert (chosen.messages, rejected.messages) == (PAIR, [USER, {**ASSISTANT, "content": "No"}])


@pytest.mark.parametrize("answer", ["[1, 2]", '[{"name": "f"}]', "[sic]", '[{"role": "user"'])
def test_other_json_is_the_text_of_an_answer(answer: str) -> None:
    assert to_chat({"prompt": "Hi", "completion": answer}, "x").messages[-1]["content"] == answer
    listed = json.dumps(PAIR)  # the fields of Alpaca are texts
    assert to_chat({"instruction": listed, "output": listed}, "x").messages[-1]["content"] == listed


def test_messages_in_python_notation_are_refused() -> None:
    for record in ({"prompt": str([USER]), "completion": "Yes"}, {"prompt": "Hi", "completion": str([ASSISTANT])}):
        with pytest.raises(UserError, match=r"x: (prompt|completion): messages in Python's notation, not JSON"):
            to_chat(record, "x")


def test_rows_of_a_table_fill_the_columns_of_one_form(tmp_path: Path) -> None:
    path = tmp_path / "chats.csv"
    messages = json.dumps(PAIR).replace('"', '""')
    path.write_text(f'messages,prompt,completion,tools\n"{messages}",,,\n,Hi,"Yes, ä",\n', encoding="utf-8")
    assert [chat.messages for chat in read(path)] == [PAIR, PAIR]
    path.write_text("messages,prompt,completion\n,,\n")
    with pytest.raises(UserError, match=r"line 2: messages: invalid JSON"):
        read(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_texts_are_read_from_every_format(tmp_path: Path, suffix: str) -> None:
    alpaca = [
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"instruction": "Hi", "input": "", "output": "Yes, ä", "other": "x"},
        {"instruction": "Hi", "output": "Yes, ä"},
    ]
    first, *others = read(write(tmp_path / f"alpaca{suffix}", alpaca))
    assert first.messages == [{"role": "user", "content": "Add\n1 2"}, {"role": "assistant", "content": "3"}]
    assert [chat.messages for chat in others] == [PAIR, PAIR]
    (chat,) = read(write(tmp_path / f"pair{suffix}", [{"prompt": "Hi", "completion": "Yes, ä"}]))
    assert (chat.messages, chat.context) == (PAIR, 0)


def test_answers_in_the_prompt_are_context() -> None:
    chat = to_chat({"prompt": [*PAIR, USER], "completion": [ASSISTANT, USER, ASSISTANT]}, "x")
    assert (chat.messages, chat.context) == ([*PAIR, *PAIR, *PAIR], 1)


def test_missing_values_of_a_table_are_absent() -> None:
    messages = [{"role": "user", "content": "Hi", "name": None}, {**ASSISTANT, "tool_calls": None}]
    assert to_chat({"prompt": None, "messages": messages, None: ["a"]}, "x").messages == PAIR
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    chat = to_chat({"messages": [USER, call], "tools": [{"name": "f"}]}, "x")
    assert chat.messages[1] == {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    assert chat.tools == [{"name": "f"}]


def test_other_fields_and_other_rows_may_have_another_form(tmp_path: Path) -> None:
    records = [{"messages": PAIR, "prompt": "Hi"}, {"prompt": "Hi", "completion": "Yes, ä"}]
    assert [chat.messages for chat in read(write(tmp_path / "a.jsonl", records))] == [PAIR, PAIR]


def test_half_of_a_surrogate_pair_is_replaced() -> None:
    assert to_chat({"prompt": "\ud83d", "completion": "\ud83d"}, "x").messages[1]["content"] == "?"


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi", "chosen": "a", "rejected": "b"},
        {"prompt": [USER], "chosen": [{**ASSISTANT, "content": "a"}], "rejected": [{**ASSISTANT, "content": "b"}]},
        {"chosen": [USER, {**ASSISTANT, "content": "a"}], "rejected": [USER, {**ASSISTANT, "content": "b"}]},
    ],
)
def test_preferences_are_two_chats_with_one_prompt(tmp_path: Path, record: dict[str, Any]) -> None:
    ((chosen, rejected),) = read_preferences([write(tmp_path / "a.jsonl", [record])], lambda _: None)
    assert chosen.messages == [USER, {"role": "assistant", "content": "a"}]
    assert rejected.messages == [USER, {"role": "assistant", "content": "b"}]
    assert chosen.context == rejected.context == 0


def test_answers_with_which_both_chats_begin_are_context() -> None:
    chosen, rejected = to_preference(
        {"chosen": [*PAIR, *PAIR], "rejected": [*PAIR, USER, {**ASSISTANT, "content": "b"}]}, "x"
    )
    assert chosen.context == rejected.context == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [{"content": "Hi"}, ASSISTANT]}, "message 1: no role; give one of system, user"),
        ({"messages": [{"role": "human", "content": "Hi"}]}, "message 1: unknown role 'human'"),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, "message 1: unknown role"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2: content is NoneType"),
        ({"messages": [USER, {"role": "assistant", "content": [{"text": "a"}]}]}, "message 2: content is list"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "message 2: empty answer"),
        ({"messages": [USER]}, "no answer"),
        ({"messages": []}, "no message"),
        ({"messages": ["Hi"]}, "message 1: str, not an object"),
        ({"messages": "Hi"}, "messages: invalid JSON"),
        ({"messages": "3"}, "messages: int, not a list"),
        ({"prompt": "Hi", "completion": ""}, "completion, message 1: empty answer"),
        ({"prompt": "Hi", "completion": 3}, "completion: int, not a list"),
        ({"prompt": [USER], "completion": [USER]}, "no answer"),
        ({"prompt": "Hi"}, "has the fields 'prompt'; give records with messages, prompt and completion"),
        ({}, "has no fields"),
        ({"instruction": "Hi", "output": ""}, "output, message 1: empty answer"),
        ({"instruction": [USER], "output": "a"}, "instruction is list, not text"),
        ({"instruction": "Hi", "output": [ASSISTANT]}, "output is list, not text"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "preference data"),
        ({"messages": PAIR, "prompt": "Hi", "completion": "a"}, "messages as well as prompt and completion; keep one"),
        ({"messages": PAIR, "tools": {"name": "f"}}, "tools is dict"),
    ],
)
def test_record_that_is_no_chat_is_named(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.jsonl", [RECORDS[0], record])
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "Hi", "completion": "a"}, "has the fields 'prompt', 'completion'; give .*rejected"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, "equal"),
        ({"prompt": "Hi", "chosen": "a", "rejected": " "}, "empty answer"),
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"chosen": PAIR, "rejected": [USER]}, "no answer"),
    ],
)
def test_record_that_is_no_preference_is_named(record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^a.jsonl, line 3: .*{message}"):
        to_preference(record, "a.jsonl, line 3")


def test_files_without_records_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"a\.jsonl: contains no example"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_text("Hi")
    with pytest.raises(UserError, match=r"a\.txt: not a table"):
        read(tmp_path / "a.txt")
    (tmp_path / "b.csv").write_text("messages,messages\n1,2\n")
    with pytest.raises(UserError, match=r"b\.csv: 2 columns are named 'messages'"):
        read(tmp_path / "b.csv")
