"""Arbitrary content of a data file gives a preference, a skipped row with its reason, or an error that names the place."""

import gzip
import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dpocli.config.options import DataOptions
from dpocli.data.encoder import Encoder
from dpocli.data.formats import BadRowError, to_preference
from dpocli.data.preference import EncodedPair, Preference, Skipped
from dpocli.data.sources import open_rows
from dpocli.errors import DataError, UsageError
from tests.data.tokenizers_for_tests import CHATML, byte_level

PROFILE = settings(
    derandomize=True, deadline=None, database=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)

PRINTS_EVERYTHING = """\
{%- for tool in tools or [] %}{{ tool | tojson }}{%- endfor %}{{ note }}\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}\
{%- if message.content is string %}{{ message.content }}{%- else %}\
{%- for part in message.content or [] %}{{ part.text }}{%- endfor %}{%- endif %}\
{%- for call in message.tool_calls or [] %}{{ call.function.name }}{{ call | tojson }}{%- endfor %}\
{{ '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"""

USER = {"role": "user", "content": "Name a tree."}
GOOD = {"role": "assistant", "content": "Oak."}
BAD = {"role": "assistant", "content": "Granite."}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
ROWS: list[dict[str, Any]] = [
    {"prompt": "Name a tree.", "chosen": " Oak.", "rejected": " Granite."},
    {"prompt": [USER], "chosen": [GOOD], "rejected": BAD, "source": "quiz", "weight": 0.5, "system": "Be brief."},
    {"chosen": [USER, CALL, {"role": "tool", "content": "green"}, GOOD], "rejected": [USER, BAD], "tools": [TOOL]},
    {"prompt": "Name a tree.", "chosen": [USER, GOOD], "rejected": [USER, BAD], "chat_template_kwargs": {"note": "x"}},
    {"chosen": "\n\nHuman: Name one.\n\nAssistant: Oak.", "rejected": "\n\nHuman: Name one.\n\nAssistant: Granite."},
    {
        "conversations": [{"from": "human", "value": "Name a tree."}],
        "chosen": {"from": "function_call", "value": '{"name": "look", "arguments": {}}'},
        "rejected": {"from": "gpt", "value": "Granite."},
        "tools": '[{"type": "function", "function": {"name": "look"}}]',
        "chat_template_kwargs": '{"note": "x"}',
    },
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "chosen": [GOOD], "rejected": [BAD]},
]

names = st.sampled_from(
    [
        *(
            "prompt",
            "chosen",
            "rejected",
            "conversations",
            "system",
            "tools",
            "chat_template_kwargs",
            "source",
            "weight",
        ),
        *(
            "role",
            "content",
            "from",
            "value",
            "tool_calls",
            "type",
            "text",
            "function",
            "name",
            "arguments",
            "documents",
        ),
    ]
)
texts = st.one_of(
    st.sampled_from(["", " ", "user", "assistant", "gpt", "human", "function_call", "[]", "{}", "null", "[1", '"x"']),
    st.sampled_from(["\n\nHuman: a\n\nAssistant:", "\n\nAssistant:", "<|im_end|>", "\0", "\ufeff", "🙂", "NaN", "{%"]),
    st.text(max_size=8),
)
atoms = st.one_of(st.none(), st.booleans(), st.integers(), st.just(10**400), st.floats(), texts)
values = st.recursive(
    atoms,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(names, texts), inner, max_size=3)),
    max_leaves=6,
)


def paths(value: Any) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(), *((key, *path) for key, item in items for path in paths(item))]


@st.composite
def rows(draw: st.DrawFn) -> Any:
    """A good row with something else in some places; or anything."""
    if draw(st.integers(0, 9)) == 0:
        return draw(values)
    row = deepcopy(draw(st.sampled_from(ROWS)))
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(paths(row)[1:]))
        place: Any = row
        for key in way:
            place = place[key]
        if isinstance(place, dict) and draw(st.booleans()):
            last = draw(st.one_of(st.just(last), names))
        place[last] = draw(values)
    return row


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def options_for(path: Path, **more: Any) -> DataOptions:
    return DataOptions(data=[str(path)], max_length=10_000).model_copy(update=more)


def read(path: Path, template: str = CHATML, **more: Any) -> list[EncodedPair | Skipped | BadRowError]:
    """What becomes of each row of a file."""
    options = options_for(path, **more)
    encoder = Encoder(byte_level(template=template), options)
    opened = open_rows(options)
    found: list[EncodedPair | Skipped | BadRowError] = []
    for raw in opened.read(0, opened.num_rows):
        try:
            preference = to_preference(raw, options)
            assert isinstance(preference, Preference)
            assert preference.where == raw.where
            assert math.isfinite(preference.weight)
            found.append(encoder.encode(preference))
        except BadRowError as error:
            assert_names_the_place(error, raw.where)
            found.append(error)
    assert len(found) == opened.num_rows
    return found


def read_or_name(path: Path) -> None:
    """The file is read, or refused by its name."""
    try:
        read(path)
    except (DataError, UsageError) as error:
        if path.name not in str(error):
            raise AssertionError("the message does not name the file") from error


def assert_names_the_place(error: BadRowError, where: str) -> None:
    message = str(error)
    assert message.startswith(f"{where}: {error.field}: " if error.field else f"{where}: ")
    assert message.endswith(".")
    assert error.where == where


@pytest.mark.parametrize("template", [CHATML, PRINTS_EVERYTHING], ids=["chatml", "prints everything"])
@pytest.mark.parametrize("text_as", ["text", "messages"])
@PROFILE
@given(found=st.lists(rows(), min_size=1, max_size=6), as_list=st.booleans())
def test_any_values_in_any_fields(
    template: str, text_as: str, found: list[Any], as_list: bool, directory: Path
) -> None:
    path = directory / ("rows.json" if as_list else "rows.jsonl")
    lines = [json.dumps(row) for row in found]
    path.write_text(f"[{', '.join(lines)}]" if as_list else "\n".join(lines))
    outcomes = read(path, template, text_as=text_as)
    skipping = options_for(path, text_as=text_as, on_bad_row="skip")
    encoder = Encoder(byte_level(template=template), skipping)
    kinds = [type(pair) for pair in encoder.encode_rows(open_rows(skipping), 0, len(found))]
    assert kinds == [Skipped if isinstance(outcome, BadRowError) else type(outcome) for outcome in outcomes]


GOOD_LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
GOOD_LIST = json.dumps(ROWS, indent=1).encode()


def good_parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([ROWS[0]] * 20), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


CONTENTS = {
    "rows.jsonl": GOOD_LINES,
    "rows.json": GOOD_LIST,
    "rows.jsonl.gz": gzip.compress(GOOD_LINES, mtime=0),
    "rows.parquet": good_parquet(),
}


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Some of it, with something put in, taken out or overwritten."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        stop = draw(st.integers(start, min(start + 40, len(content))))
        content = content[:start] + draw(st.binary(max_size=8)) + content[stop:]
    return content[: draw(st.integers(0, len(content)))] if draw(st.integers(0, 3)) == 0 else content


@pytest.mark.parametrize("name", CONTENTS)
@PROFILE
@given(data=st.data())
def test_any_bytes(name: str, data: st.DataObject, directory: Path) -> None:
    path = directory / name
    path.write_bytes(data.draw(st.one_of(st.binary(max_size=200), damaged(CONTENTS[name]))))
    read_or_name(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@PROFILE
@given(content=st.text(max_size=60), encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1"]))
@example(content="[" * 20_000, encoding="utf-8")
@example(content='{"a":' * 20_000, encoding="utf-8")
@example(content="[" + "9" * 5000 + "]", encoding="utf-8")
def test_any_text_in_any_encoding(name: str, content: str, encoding: str, directory: Path) -> None:
    path = directory / name
    path.write_bytes(content.encode(encoding, "replace"))
    read_or_name(path)


CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
DEEP_TEXT = "[" * 100_000


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tools": DEEP_TEXT}, "tools"),
        ({"tools": [DEEP_TEXT]}, "tools[0]"),
        ({"chat_template_kwargs": DEEP_TEXT}, "chat_template_kwargs"),
        ({"chosen": {"from": "function_call", "value": DEEP_TEXT}}, "chosen[0].value"),
    ],
    ids=["tools", "a tool", "chat_template_kwargs", "function_call"],
)
def test_json_inside_json_that_is_nested_too_deep(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**CHAT, **change}))
    (outcome,) = read(path)
    assert isinstance(outcome, BadRowError)
    assert str(outcome).startswith(f"rows.jsonl:1: {field}: ")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize(
    "row",
    [
        {**CHAT, "chosen": [{**GOOD, "extra": "HERE"}]},
        {**CHAT, "tools": ["HERE"]},
        {**CHAT, "chat_template_kwargs": {"note": "HERE"}},
    ],
    ids=["message", "tools", "chat_template_kwargs"],
)
def test_values_of_any_depth(row: dict[str, Any], name: str, tmp_path: Path) -> None:
    """As deep as this Python reads them; beyond that the line, or the file, is no JSON."""
    path, line = tmp_path / name, json.dumps(row)
    for depth in range(100, 1200, 50):
        deep = line.replace('"HERE"', '{"a": ' * depth + "1" + "}" * depth)
        path.write_text(f"[{deep}]" if name.endswith(".json") else deep)
        read_or_name(path)


HALF = r"\ud83d"


@pytest.mark.parametrize(
    "change",
    [
        {"tools": f'[{{"type": "function", "function": {{"name": "{HALF}"}}}}]'},
        {"chat_template_kwargs": f'{{"note": "{HALF}"}}'},
        {"chosen": {"from": "function_call", "value": f'{{"name": "{HALF}", "arguments": {{}}}}'}},
    ],
    ids=["tools", "chat_template_kwargs", "function_call"],
)
def test_half_a_character_inside_json_inside_json(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**CHAT, **change}))
    (outcome,) = read(path, PRINTS_EVERYTHING)
    assert isinstance(outcome, BadRowError)
    assert "half of a character" in str(outcome)


@pytest.mark.parametrize("kind", [pa.timestamp("us"), pa.date32(), pa.duration("s")], ids=str)
def test_a_date_that_python_cannot_hold(kind: pa.DataType, tmp_path: Path) -> None:
    far = pa.array([2**30], pa.int32()).cast(kind) if kind == pa.date32() else pa.array([2**60]).cast(kind)
    pq.write_table(
        pa.table({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"], "source": far}), tmp_path / "x.parquet"
    )
    with pytest.raises(DataError, match=r"x\.parquet"):
        read(tmp_path / "x.parquet")


def test_gzip_is_told_by_a_name_in_capitals_too(tmp_path: Path) -> None:
    path = tmp_path / "ROWS.JSONL.GZ"
    path.write_bytes(gzip.compress(json.dumps(ROWS[0]).encode()))
    (outcome,) = read(path)
    assert isinstance(outcome, EncodedPair)


@pytest.mark.parametrize(
    "row", [{**CHAT, "weight": 10**4000}, {f"field {number}": 1 for number in range(3000)}, {"x" * 5000: 1}],
    ids=["a huge number", "many fields", "a long name"],
)  # fmt: skip
def test_a_message_stays_short(row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    (outcome,) = read(path)
    assert isinstance(outcome, BadRowError)
    assert len(str(outcome)) < 700
