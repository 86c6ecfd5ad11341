"""Files that somebody may give as --data, each wrong in one way: what is in them, the exit code, and the words to come."""

import gzip
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

DONE, USAGE, DATA = 0, 2, 3

TEXT = {"prompt": "Name a tree.", "chosen": " Oak.", "rejected": " Granite."}
USER = {"role": "user", "content": "Name a tree."}
GOOD = {"role": "assistant", "content": "Oak."}
BAD = {"role": "assistant", "content": "Granite."}
CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "Name a tree."}],
    "chosen": {"from": "gpt", "value": "Oak."},
    "rejected": {"from": "gpt", "value": "Granite."},
}


@dataclass(frozen=True)
class BadFile:
    """A file, or a directory, that a command line names."""

    name: str
    content: bytes | Callable[[Path], object]
    code: int
    words: tuple[str, ...]
    """What the message must contain; where all is well, what standard output must."""
    options: tuple[str, ...] = ()

    def make(self, directory: Path) -> Path:
        path = directory / self.name
        if isinstance(self.content, bytes):
            path.write_bytes(self.content)
        else:
            self.content(path)
        return path


def lines(*rows: object) -> bytes:
    """JSON Lines; bytes are used unchanged."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def parquet(table: dict[str, Any] | pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), sink)
    return sink.getvalue()


def zipped(content: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("prefs.jsonl", content)
    return sink.getvalue()


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def directory_of(**files: bytes) -> Callable[[Path], object]:
    """A directory; `__` in a name means a dot."""

    def make(path: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            (path / name.replace("__", ".")).write_bytes(content)

    return make


def saved(*splits: str) -> Callable[[Path], object]:
    """A data set as the `datasets` library saves it; with splits, or without."""

    def make(path: Path) -> None:
        import datasets

        rows = datasets.Dataset.from_list([TEXT] * 3)
        whole = datasets.DatasetDict(dict.fromkeys(splits, rows)) if splits else rows
        whole.save_to_disk(str(path))

    return make


def saved_and_broken(path: Path) -> None:
    saved()(path)
    for arrow in path.glob("*.arrow"):
        arrow.write_bytes(arrow.read_bytes()[:100])


MANY = lines(*[TEXT | {"chosen": f" Oak {number}."} for number in range(200)])
PARQUET = parquet({name: [value] * 500 for name, value in TEXT.items()})
PLAIN = {name: [value] for name, value in TEXT.items()}
HALF = b'{"prompt": "a", "chosen": "\\ud83d", "rejected": "c"}'
DEEP = b'{"prompt": "a", "chosen": ' + b"[" * 100_000 + b"]" * 100_000 + b', "rejected": "c"}'
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def row(number: int, change: dict[str, Any], start: dict[str, Any] = CHAT) -> bytes:
    """Good rows, and in line `number` one with something else."""
    return lines(*[start] * (number - 1), start | change, start)


BAD_FILES = [
    # not what the name says
    BadFile("empty.jsonl", b"", DATA, ("empty.jsonl: holds no rows",)),
    BadFile("blank.jsonl", b"\n   \n\t\n", DATA, ("blank.jsonl: holds no rows",)),
    BadFile("mark.jsonl", b"\xef\xbb\xbf", DATA, ("mark.jsonl: holds no rows",)),
    BadFile("empty.json", b"", DATA, ("empty.json: holds no rows",)),
    BadFile("empty_list.json", b"[]", DATA, ("empty_list.json: holds no rows",)),
    BadFile("empty.jsonl.gz", b"", DATA, ("empty.jsonl.gz: holds no rows",)),
    BadFile("nothing.jsonl.gz", gzip.compress(b""), DATA, ("nothing.jsonl.gz: holds no rows",)),
    BadFile("empty.parquet", b"", DATA, ("empty.parquet: not a Parquet file", "again")),
    BadFile("no_rows.parquet", parquet({name: pa.array([], pa.string()) for name in TEXT}), DATA, ("holds no rows",)),
    BadFile("list.jsonl", json.dumps([TEXT, TEXT]).encode(), DATA, ("list.jsonl:1", "found list", "name it .json")),
    BadFile("printed.jsonl", json.dumps(TEXT, indent=2).encode(), DATA, ("printed.jsonl:1: column 2: not JSON", "one JSON object")),
    BadFile("object.json", json.dumps({"data": [TEXT]}).encode(), DATA, ("object.json:1: chosen: missing", "'data'")),
    BadFile("printed.json", json.dumps(TEXT, indent=2).encode(), DATA, ("printed.json:1: column 2: not JSON", "one JSON object")),
    BadFile("text.json", b'"prefs"', DATA, ("text.json:1: column 1", "a JSON list of rows is expected")),
    BadFile("page.jsonl", b"<!DOCTYPE html>\n<html>404</html>\n", DATA, ("page.jsonl:1: column 1: not JSON",)),
    BadFile("pointer.parquet", b"version https://git-lfs.github.com/spec/v1\n", DATA, ("pointer.parquet: not a Parquet file",)),
    BadFile("prefs.csv", b"prompt,chosen,rejected\na,b,c\n", USAGE, ("prefs.csv: files of this kind are not read", ".jsonl")),
    BadFile("prefs.zip", zipped(MANY), USAGE, ("prefs.zip: files of this kind are not read", ".jsonl.gz")),
    BadFile("prefs.jsonl.zst", b"\x28\xb5\x2f\xfd", USAGE, ("prefs.jsonl.zst: files of this kind are not read",)),
    BadFile("prefs.json.gz", gzip.compress(json.dumps([TEXT]).encode()), USAGE, ("prefs.json.gz: files of this kind",)),
    BadFile("prefs", MANY, USAGE, ("prefs: files of this kind are not read",)),
    BadFile("zipped.jsonl", zipped(MANY), DATA, ("zipped.jsonl:1", "not UTF-8")),
    BadFile("packed.jsonl", gzip.compress(MANY), DATA, ("packed.jsonl:1: column 2: byte 0x8b is not UTF-8",)),
    BadFile("plain.jsonl.gz", MANY, DATA, ("plain.jsonl.gz: the gzip data is damaged", "gzip -t")),
    # damaged
    BadFile("short.jsonl.gz", gzip.compress(MANY)[:-20], DATA, ("short.jsonl.gz: the gzip data is damaged or cut off", "gzip -t")),
    BadFile("flipped.jsonl.gz", flipped(gzip.compress(MANY), 60), DATA, ("flipped.jsonl.gz: the gzip data is damaged",)),
    BadFile("sum.jsonl.gz", flipped(gzip.compress(MANY), -8), DATA, ("sum.jsonl.gz: the gzip data is damaged", "CRC")),
    BadFile("tail.jsonl.gz", gzip.compress(MANY) + b"tail", DATA, ("tail.jsonl.gz: the gzip data is damaged",)),
    BadFile("short.parquet", PARQUET[:-50], DATA, ("short.parquet: not a Parquet file that can be read", "again")),
    BadFile("head.parquet", PARQUET[:100], DATA, ("head.parquet: not a Parquet file that can be read",)),
    BadFile("footer.parquet", flipped(PARQUET, len(PARQUET) - 9), DATA, ("footer.parquet: not a Parquet file",)),
    BadFile("short.jsonl", MANY[:-20], DATA, ("short.jsonl:200: column", "not JSON")),
    BadFile("cut.json", json.dumps([TEXT] * 3).encode()[:-30], DATA, ("cut.json: the list is cut off after 2 whole rows", "again")),
    BadFile("comma.json", json.dumps([TEXT]).encode()[:-1] + b",]", DATA, ("comma.json:1: column ", "there is a comma before this closing bracket (after 1 whole rows). Take that comma out.")),
    BadFile("no_comma.json", b"[{}\n {}]" + b" " * 20, DATA, ("no_comma.json:2: column 2: ',' or ']' is expected",)),
    BadFile("two_lists.json", json.dumps([TEXT]).encode() * 2, DATA, ("two_lists.json:1", "something follows the list")),
    BadFile("quotes.jsonl", lines(TEXT, str(TEXT).encode()), DATA, ("quotes.jsonl:2: column 2: not JSON",)),
    BadFile("two_in_a_line.jsonl", json.dumps(TEXT).encode() * 2, DATA, ("two_in_a_line.jsonl:1: column 71: not JSON: Extra data",)),
    BadFile("line_comma.jsonl", lines(TEXT).replace(b"}\n", b"},\n"), DATA, ("line_comma.jsonl:1", "not JSON: Extra data")),
    BadFile("raw_newline.jsonl", b'{"prompt": "a\nb"}\n', DATA, ("raw_newline.jsonl:1", "not JSON: Unterminated string")),
    BadFile("infinite.jsonl", b'{"prompt": "a", "chosen": Inf}\n', DATA, ("infinite.jsonl:1: column 27: not JSON",)),
    BadFile("zeros.jsonl", MANY + bytes(100), DATA, ("zeros.jsonl:201: column 1: not JSON",)),
    BadFile("conflict.jsonl", lines(TEXT, b"<<<<<<< HEAD", TEXT), DATA, ("conflict.jsonl:2: column 1: not JSON",)),
    # characters
    BadFile("latin.jsonl", lines(TEXT, json.dumps(TEXT).replace("Oak", "Chêne").encode("latin-1")), DATA, ("latin.jsonl:2", "byte 0xea is not UTF-8")),
    BadFile("latin.json", json.dumps([TEXT]).replace("Oak", "Chêne").encode("latin-1"), DATA, ("latin.json: not UTF-8", "0xea")),
    BadFile("utf16.jsonl", json.dumps(TEXT).encode("utf-16"), DATA, ("utf16.jsonl:1: column 1: byte 0xff is not UTF-8",)),
    BadFile("utf16.json", json.dumps([TEXT]).encode("utf-16"), DATA, ("utf16.json: not UTF-8", "Save it as UTF-8")),
    BadFile("utf16_bare.jsonl", json.dumps(TEXT).encode("utf-16-be"), DATA, ("utf16_bare.jsonl:1: column 1: not JSON",)),
    BadFile("two_marks.jsonl", b"\xef\xbb\xbf\xef\xbb\xbf" + lines(TEXT), DATA, ("two_marks.jsonl:1: column 1: not JSON", "BOM")),
    BadFile("half.jsonl", lines(TEXT, HALF), DATA, ("half.jsonl:2: \\ud83d is half of a character", "whole pair")),
    BadFile("half.json", b"[" + HALF + b"]", DATA, ("half.json: row 1: \\ud83d is half of a character",)),
    BadFile("deep.jsonl", lines(TEXT, DEEP), DATA, ("deep.jsonl:2: not JSON",)),
    BadFile("deep.json", b"[" + DEEP + b"]", DATA, ("deep.json:1: column 2", "after 0 whole rows")),
    BadFile("digits.jsonl", lines(TEXT, b'{"weight": ' + b"9" * 5000 + b"}"), DATA, ("digits.jsonl:2: not JSON: Exceeds the limit",)),
    # rows that are none
    BadFile("number.jsonl", lines(TEXT, 7), DATA, ("number.jsonl:2: a JSON object with the fields", "found int")),
    BadFile("null.jsonl", lines(TEXT, None), DATA, ("null.jsonl:2: a JSON object with the fields", "found NoneType")),
    BadFile("bare_text.jsonl", lines("prompt"), DATA, ("bare_text.jsonl:1: a JSON object", "found str")),
    BadFile("lists.json", json.dumps([[TEXT], [TEXT]]).encode(), DATA, ("lists.json: row 1: a JSON object", "found list")),
    BadFile("nothing_in_it.jsonl", lines({}), DATA, ("nothing_in_it.jsonl:1: chosen: missing; the row has nothing",)),
    BadFile("other_names.jsonl", lines({"question": "a", "good": "b", "bad": "c"}), DATA, ("chosen: missing; the row has 'question', 'good', 'bad'", "--chosen-field")),
    BadFile("kto.jsonl", lines({"prompt": "a", "completion": "b", "label": True}), DATA, ("kto.jsonl:1: chosen: missing", "'completion'")),
    BadFile("one_side.jsonl", lines({"prompt": "a", "chosen": "b"}), DATA, ("one_side.jsonl:1: rejected: missing",)),
    # fields of other kinds
    BadFile("null_side.jsonl", row(2, {"rejected": None}), DATA, ("null_side.jsonl:2: rejected: is null; fill it in or remove the row",)),
    BadFile("number_side.jsonl", row(3, {"chosen": 3}), DATA, ("number_side.jsonl:3: chosen: text or messages are expected, found a number",)),
    BadFile("true_side.jsonl", row(1, {"chosen": True}), DATA, ("true_side.jsonl:1: chosen: text or messages", "found true or false")),
    BadFile("number_prompt.jsonl", row(1, {"prompt": 5}), DATA, ("number_prompt.jsonl:1: prompt: text or a list of messages", "a number")),
    BadFile("number_text_prompt.jsonl", row(1, {"prompt": 5}, TEXT), DATA, ("prompt: text is expected beside text answers, found a number",)),
    BadFile("mixed_sides.jsonl", row(1, {"chosen": "Oak."}), DATA, ("chosen: is text, but the other side holds messages",)),
    BadFile("chat_beside_text.jsonl", row(1, {"prompt": [USER]}, TEXT), DATA, ("prompt: text is expected beside text answers, found a list",)),
    BadFile("nested_side.jsonl", row(1, {"chosen": [[GOOD]]}), DATA, ("nested_side.jsonl:1: chosen[0]: a message", "found a list")),
    BadFile("texts_side.jsonl", row(1, {"chosen": ["Oak."]}), DATA, ("chosen[0]: a message", "found text")),
    BadFile("null_message.jsonl", row(1, {"rejected": [BAD, None]}), DATA, ("rejected[1]: a message", "found nothing")),
    BadFile("no_role.jsonl", row(1, {"chosen": [{"content": "Oak."}]}), DATA, ("chosen[0].role: a role such as user or assistant", "nothing")),
    BadFile("number_role.jsonl", row(1, {"chosen": [{"role": 1, "content": "Oak."}]}), DATA, ("chosen[0].role: a role", "a number")),
    BadFile("gpt_role.jsonl", row(1, {"chosen": [{"role": "gpt", "content": "Oak."}]}), DATA, ("chosen[0].role", "'gpt'; write 'assistant'")),
    BadFile("no_content.jsonl", row(1, {"prompt": [{"role": "user"}]}), DATA, ("prompt[0].content: missing", "tool_calls")),
    BadFile("number_content.jsonl", row(1, {"chosen": [{"role": "assistant", "content": 1}]}), DATA, ("chosen[0].content: text or a list of typed parts",)),
    BadFile("text_parts.jsonl", row(1, {"chosen": [{"role": "assistant", "content": ["Oak."]}]}), DATA, ('chosen[0].content[0]: a part {"type"',)),
    BadFile("parts.jsonl", row(1, {"chosen": [{"role": "assistant", "content": [{"type": "text", "text": "Oak."}]}]}), DATA, ("parts.jsonl:1: messages: the chat template refuses the conversation",)),
    BadFile("calls.jsonl", row(1, {"chosen": [{"role": "assistant", "tool_calls": {"name": "look"}}]}), DATA, ("chosen[0].tool_calls: a list of calls", "an object")),
    BadFile("call_texts.jsonl", row(1, {"chosen": [{"role": "assistant", "tool_calls": ["look"]}]}), DATA, ("chosen[0].tool_calls: a list of calls",)),
    BadFile("call_alone.jsonl", row(1, {"chosen": [{"role": "assistant", "tool_calls": [{"name": "look"}]}]}), DATA, ("call_alone.jsonl:1: messages: the chat template refuses",)),
    BadFile("no_assistant.jsonl", row(2, {"chosen": [USER]}), DATA, ("no_assistant.jsonl:2: chosen: has no message of the assistant",)),
    BadFile("other_prompt.jsonl", lines({"prompt": "Name a star.", "chosen": [USER, GOOD], "rejected": [USER, BAD]}), DATA, ("prompt: is not the user turn with which both sides begin",)),
    BadFile("two_systems.jsonl", row(1, {"prompt": [{"role": "system", "content": "Be brief."}, USER], "system": "Be long."}), DATA, ("system: differs from the system message",)),
    BadFile("system_in_text.jsonl", row(1, {"system": "Be brief."}, TEXT), DATA, ("system: has no place in a text row", "--text-as messages")),
    BadFile("list_system.jsonl", row(1, {"system": ["Be brief."]}), DATA, ("system: text is expected, found a list",)),
    BadFile("tools_in_text.jsonl", row(1, {"tools": [{"name": "look"}]}, TEXT), DATA, ("tools: has no place in a text row",)),
    BadFile("tools_text.jsonl", row(1, {"tools": "look, listen"}), DATA, ("tools: is text, but not JSON",)),
    BadFile("tools_object.jsonl", row(1, {"tools": {"name": "look"}}), DATA, ("tools: a list of tools", "found an object")),
    BadFile("tools_names.jsonl", row(1, {"tools": [7]}), DATA, ("tools[0]: a JSON schema is expected, found a number",)),
    BadFile("kwargs_list.jsonl", row(1, {"chat_template_kwargs": [1]}), DATA, ("chat_template_kwargs: an object is expected, found a list",)),
    BadFile("kwargs_text.jsonl", row(1, {"chat_template_kwargs": "{a: 1}"}), DATA, ("chat_template_kwargs: is text, but not JSON",)),
    BadFile("kwargs_taken.jsonl", row(1, {"chat_template_kwargs": {"tokenize": True}}), DATA, ("chat_template_kwargs: tokenize cannot be set by a row",)),
    BadFile("number_source.jsonl", row(1, {"source": 3}), DATA, ("source: text is expected, found a number",)),
    BadFile("negative_weight.jsonl", row(4, {"weight": -0.5}), DATA, ("negative_weight.jsonl:4: weight: a finite number of at least 0", "-0.5")),
    BadFile("nan_weight.jsonl", row(1, {"weight": float("nan")}), DATA, ("weight: a finite number of at least 0", "nan")),
    BadFile("endless_weight.jsonl", row(1, {"weight": float("inf")}), DATA, ("weight: a finite number of at least 0", "inf")),
    BadFile("text_weight.jsonl", row(1, {"weight": "1"}), DATA, ("weight: a finite number of at least 0", "'1'")),
    BadFile("true_weight.jsonl", row(1, {"weight": True}), DATA, ("weight: a finite number of at least 0", "True")),
    BadFile("last_key_counts.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": null}\n', DATA, ("chosen: is null",)),
    # ShareGPT and transcripts
    BadFile("sharegpt_from.jsonl", row(1, {"chosen": {"from": "alien", "value": "Oak."}}, SHAREGPT), DATA, ("chosen[0].from: 'alien' is not known; known are human",)),
    BadFile("sharegpt_value.jsonl", row(1, {"chosen": {"from": "gpt", "text": "Oak."}}, SHAREGPT), DATA, ("chosen[0].value: text is expected, found nothing",)),
    BadFile("sharegpt_call.jsonl", row(1, {"chosen": {"from": "function_call", "value": "look()"}}, SHAREGPT), DATA, ("chosen[0].value: a function call in JSON",)),
    BadFile("sharegpt_keys.jsonl", lines({"conversations": [{"speaker": "human", "says": "a"}]} | {name: SHAREGPT[name] for name in ("chosen", "rejected")}), DATA, ("conversations[0].role: a role such as user",)),
    BadFile("sharegpt_human.jsonl", row(1, {"chosen": {"from": "human", "value": "Oak."}}, SHAREGPT), DATA, ("chosen: has no message of the assistant",)),
    # nothing to learn from
    BadFile("same_sides.jsonl", lines(CHAT | {"rejected": [GOOD]}), DATA, ("1 of 1 rows give no pair", "the sides are identical", "same_sides.jsonl:1")),
    BadFile("same_texts.jsonl", lines(*[TEXT | {"rejected": " Oak."}] * 3, TEXT), DATA, ("3 of 4 rows give no pair", "identical", "--max-skipped allows 50%")),
    BadFile("empty_sides.jsonl", lines(TEXT | {"chosen": ""}), DATA, ("1 of 1 rows give no pair", "a side is empty")),
    BadFile("empty_lists.jsonl", lines({"prompt": [USER], "chosen": [], "rejected": []}), DATA, ("a side is empty", "empty_lists.jsonl:1")),
    BadFile("silent.jsonl", lines(CHAT | {"chosen": [{"role": "assistant", "content": ""}]}), DATA, ("a side is empty",)),
    BadFile("same_transcripts.jsonl", lines(dict.fromkeys(("chosen", "rejected"), "\n\nHuman: a\n\nAssistant: b")), DATA, ("the sides are identical",)),
    BadFile("unanswered.jsonl", lines({"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"}), DATA, ("a side is empty",)),
    # Parquet
    BadFile("numbers.parquet", parquet(PLAIN | {"chosen": [1]}), DATA, ("numbers.parquet: row 1: chosen: text or messages", "a number")),
    BadFile("bytes.parquet", parquet({name: [value.encode()] for name, value in TEXT.items()}), DATA, ("chosen: text or messages are expected, found bytes",)),
    BadFile("columns.parquet", parquet({"question": ["a"], "answer": ["b"]}), DATA, ("chosen: missing; the row has 'question', 'answer'",)),
    BadFile("no_columns.parquet", parquet(pa.table({})), DATA, ("no_columns.parquet: holds no rows",)),
    BadFile("nulls.parquet", parquet(PLAIN | {"rejected": pa.array([None], pa.string())}), DATA, ("nulls.parquet: row 1: rejected: is null",)),
    BadFile("null_column.parquet", parquet(PLAIN | {"chosen": pa.nulls(1)}), DATA, ("null_column.parquet: row 1: chosen: is null",)),
    BadFile("null_content.parquet", parquet({"chosen": pa.array([[GOOD | {"content": None}]], MESSAGES), "rejected": pa.array([[BAD]], MESSAGES)}), DATA, ("chosen[0].content: missing",)),
    BadFile("null_messages.parquet", parquet({"chosen": pa.array([[None]], MESSAGES), "rejected": pa.array([[BAD]], MESSAGES)}), DATA, ("chosen[0]: a message", "found nothing")),
    BadFile("dates.parquet", parquet(PLAIN | {"source": pa.array([0], pa.timestamp("us"))}), DATA, ("source: text is expected, found datetime",)),
    BadFile("decimals.parquet", parquet(PLAIN | {"weight": pa.array([1]).cast(pa.decimal128(30, 2))}), DATA, ("weight: a finite number of at least 0",)),
    BadFile("wrong_row.parquet", parquet({name: [value] * 9 for name, value in TEXT.items()} | {"weight": [1.0] * 8 + [-1.0]}), DATA, ("wrong_row.parquet: row 9: weight",)),
    # directories and data sets
    BadFile("no_data", directory_of(README__md=b"nothing", prefs__csv=b"a,b"), USAGE, ("no_data: the directory holds no .jsonl", "not searched")),
    BadFile("mixed", directory_of(a__jsonl=MANY, b__parquet=PARQUET, c__json=b"[1]", d__txt=b""), DATA, ("c.json: row 1: a JSON object", "found int")),
    BadFile("one_broken", directory_of(a__jsonl=MANY, b__jsonl__gz=b"??"), DATA, ("b.jsonl.gz: the gzip data is damaged",)),
    BadFile("all_empty", directory_of(a__jsonl=b"", b__json=b"[]"), DATA, ("all_empty: holds no rows",)),
    BadFile("saved_splits", saved("validation", "test"), USAGE, ("--data-split train", "has no such split; it has", "validation")),
    BadFile("saved_broken", saved_and_broken, DATA, ("saved_broken: the saved data set cannot be loaded", "Save it again")),
    BadFile("saved_state", directory_of(state__json=b"{}"), DATA, ("saved_state: the saved data set cannot be loaded",)),
    # strange, and right
    BadFile("bom.jsonl", b"\xef\xbb\xbf" + lines(TEXT, CHAT), DONE, ('"pairs": 2',)),
    BadFile("windows.jsonl", lines(TEXT, CHAT).replace(b"\n", b"\r\n"), DONE, ('"pairs": 2',)),
    BadFile("gaps.jsonl", lines(b"", TEXT, b"  ", b"", CHAT, b""), DONE, ('"pairs": 2',)),
    BadFile("lines.json", lines(TEXT, CHAT), DONE, ('"pairs": 2',)),
    BadFile("nul.jsonl", lines(TEXT | {"chosen": " O\0ak."}, CHAT), DONE, ('"pairs": 2',)),
    BadFile("unused.jsonl", lines(TEXT | {"embedding": float("nan"), "id": 10**50, "meta": [[[]]]}, CHAT), DONE, ('"pairs": 2',)),
    # with options
    BadFile("split.jsonl", MANY, USAGE, ("--data-split test", "only data sets in the datasets format"), ("--data-split", "test")),
    BadFile("kept.jsonl", MANY, DATA, ("kept.jsonl:1: colour: missing", "--keep-columns"), ("--keep-columns", "colour")),
    BadFile("kept_kinds.jsonl", lines(*[TEXT | {"id": 1}] * 1024, TEXT | {"id": "x"}), DATA, ("Row 1024: the kept column id holds str here and int",), ("--keep-columns", "id")),
    BadFile("kept_clash.jsonl", lines(TEXT | {"row": 1}), USAGE, ("--keep-columns row: the cache has a column of that name",), ("--keep-columns", "row")),
    BadFile("field.jsonl", lines(TEXT), DATA, ("field.jsonl:1: better: missing", "'chosen'"), ("--chosen-field", "better")),
    BadFile("wrapped.jsonl", lines({"chosen": "a", "rejected": "b"}), DATA, ("prompt: missing; --text-as messages needs a text",), ("--text-as", "messages")),
    BadFile("long.jsonl", lines(TEXT), DATA, ("1 of 1 rows give no pair", "longer than --max-length"), ("--max-length", "4", "--truncation", "drop")),
    BadFile("skipped.jsonl", lines(TEXT, b"??", b"??", b"??"), DATA, ("3 of 4 rows give no pair", "the row cannot be read", "skipped.jsonl:2"), ("--on-bad-row", "skip")),
]  # fmt: skip
