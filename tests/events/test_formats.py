from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dagster_prefs.declarations.registry import Registry, RegistryError
from dagster_prefs.events.fields import Years
from dagster_prefs.events.formats import EventFileError, LineReader, Record, detect, read_records
from dagster_prefs.events.messages import Topic, event_time, shift_message
from dagster_prefs.events.validity import rejection_reason
from dagster_prefs.textfiles import MAX_CELL_BYTES, ROW_FAULTS

NOW = datetime(2026, 11, 21, tzinfo=UTC)
YEARS = Years(2000, 2100)
VIEW = {"event_id": "a", "viewer_id": 1, "watched_at": "2026-01-01T00:00:00Z"}
REES46 = "event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session"


def messages(registry: Registry, path: Path, **options: str) -> list[tuple[int, bytes | None]]:
    found = detect(path, registry, **options)  # type: ignore[arg-type]
    with LineReader(path) as reader:
        return [(record.line, record.message) for record in read_records(reader, found)]


@given(st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")), max_size=20), st.booleans())
@settings(deadline=None)
def test_a_json_line_is_kept_byte_for_byte(
    registry: Registry, tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], packed: bool
) -> None:
    path = tmp_path_factory.mktemp("lines") / "events.jsonl"
    content = b"\n".join([json.dumps(VIEW).encode(), *lines])
    path.write_bytes(gzip.compress(content) if packed else content)
    expected: list[tuple[int, bytes | None]] = []
    for number, line in enumerate(content.split(b"\n"), 1):
        ended = number <= len(lines)
        if line or ended:
            kept = line.removesuffix(b"\r")
            expected.append((number, kept if line.strip() else None))
    assert messages(registry, path, topic="view_events") == expected


cells = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), max_size=12)
# What is no number; those have a test of their own.
words = cells.filter(lambda cell: not cell.strip().lstrip("-")[:1].isdigit())


@given(st.lists(st.tuples(words, cells, cells), min_size=1, max_size=15))
@settings(deadline=None)
def test_csv_cells_come_through_exactly(
    registry: Registry, tmp_path_factory: pytest.TempPathFactory, table: list[tuple[str, str, str]]
) -> None:
    path = tmp_path_factory.mktemp("csv") / "items.csv"
    names = ("item_id", "title", "price")

    def quoted(row: Iterable[str]) -> str:
        return ",".join('"' + cell.replace('"', '""') + '"' for cell in row) + "\n"

    path.write_text(",".join(names) + "\n" + "".join(map(quoted, table)), encoding="utf-8", newline="")
    line, expected = 2, []
    for row in table:
        expected.append((line, {name: cell for name, cell in zip(names, row, strict=True) if cell}))
        line += quoted(row).count("\n")
    assert [(n, json.loads(m)) for n, m in messages(registry, path) if m is not None] == expected


@pytest.mark.parametrize(
    ("cell", "kept"),
    [
        ("12345", "12345"), ("12345.0", "12345"), ("1.2345e4", "12345"), ("1.2345E+04", "12345"),
        ("1e+16", "10000000000000000"),
        ("-7.50", "-7.5"), (" 3.0 ", "3"), ("0.0", "0"), ("18446744073709551615.0", "18446744073709551615"),
        # No numbers: leading zeros, a hexadecimal id, words, and what is beyond any id.
        ("007", "007"), ("01.0", "01.0"), ("12e5", "12e5"), ("1.0.0", "1.0.0"), ("NaN", "NaN"), ("x1.0", "x1.0"),
        ("1e+400", "1e+400"), ("1" * 400 + ".0", "1" * 400 + ".0"),
    ],
)  # fmt: skip
def test_a_number_in_a_csv_is_one_id_however_it_is_written(
    registry: Registry, tmp_path: Path, cell: str, kept: str | None
) -> None:
    path = tmp_path / "events.csv"
    path.write_text(f"event_id,user_id,event_type,event_time,price\ne1,{cell},view,2026-01-01,{cell}\n")
    ((_, message),) = messages(registry, path)
    found = json.loads(message or b"")
    assert (found["user_id"], found["price"]) == (kept, cell)
    rees46 = tmp_path / "oct.csv"
    rees46.write_text(f"{REES46}\n2019-10-01 00:00:00 UTC,cart,{cell},1,,b,35.790,{cell},s-1\n")
    ((_, message),) = messages(registry, rees46)
    found = json.loads(message or b"")
    # There NaN is what a tool writes where a cell was empty.
    kept = None if kept == "NaN" else kept
    assert (found.get("user_id"), found.get("item_id"), found["price"]) == (kept, kept, "35.790")


def test_a_title_in_a_csv_stays_as_it_stands(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_text("item_id,title,price\n2.0,2.0,2.0\n")
    assert [json.loads(m or b"") for _, m in messages(registry, path)] == [
        {"item_id": "2", "title": "2.0", "price": "2.0"}
    ]


def test_rows_that_do_not_fit_are_kept_as_they_came_and_named(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    head = b"event_id,user_id,event_type,event_time\n"
    bad = {
        b"e2,u2,view": ("cells", "3 cells, 4 columns"),
        b'e3,"open quote,view,2026-01-01': ("quotes", "unclosed quote"),
        b"e4,\xff,view,2026-01-01T00:00:00Z": ("encoding", "not UTF-8"),
        b"e5,a\0b,view,2026-01-01T00:00:00Z": ("nul", "U+0000"),
        b"e6," + b"x" * (MAX_CELL_BYTES + 1) + b",view,2026-01-01T00:00:00Z": ("size", "beyond the limit"),
        b"e7," + b"\xc3\xa9" * (MAX_CELL_BYTES // 2 + 1) + b",view,2026-01-01": ("size", "beyond the limit"),
        b"a,b,c,d,e": ("cells", "5 cells, 4 columns"),
    }
    good = b"e9,u5,view,2026-01-01T00:00:00Z"
    path.write_bytes(head + b"\r\n".join([*bad, b"", good]))
    found = detect(path, registry)
    with LineReader(path) as reader:
        records = list(read_records(reader, found))
    for number, (record, (raw, (fault, why))) in enumerate(zip(records, bad.items(), strict=False), 2):
        held = json.loads(record.message or b"")
        assert (record.line, held["malformed_row"]) == (number, fault)
        assert why in (record.fault or "")
        exact = held.get("row_base64")
        assert (base64.b64decode(exact) if exact else held["row"].encode()) == raw
        assert rejection_reason(record.message or b"", found.topic, NOW) == ROW_FAULTS[fault]
    assert records[-2] == Record(len(bad) + 2, None)
    assert (records[-1].line, records[-1].fault) == (len(bad) + 3, None)
    assert json.loads(records[-1].message or b"") == {
        "event_id": "e9", "user_id": "u5", "event_type": "view", "event_time": "2026-01-01T00:00:00Z",
    }  # fmt: skip


def test_rees46_rows_become_shop_events(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "oct.csv"
    row = "2019-10-01 00:00:00 UTC,cart,44600062,2103807459595387724,,shiseido,35.790,541312140,s-1"
    path.write_text(f"{REES46}\n{row}\n")
    ((line, message),) = messages(registry, path)
    declared = [
        "",
        "541312140",
        "44600062",
        "add_to_cart",
        "",
        "shiseido",
        "35.79",
        "s-1",
        "2019-10-01T00:00:00+00:00",
    ]
    identity = hashlib.sha256(json.dumps(declared, separators=(",", ":")).encode()).hexdigest()
    assert (line, json.loads(message or b"")) == (
        2,
        {
            "event_id": "rees46-" + identity[:32],
            "event_time": "2019-10-01 00:00:00 UTC",
            "event_type": "add_to_cart",
            "item_id": "44600062",
            "category_id": "2103807459595387724",
            "brand": "shiseido",
            "price": "35.790",
            "user_id": "541312140",
            "session_id": "s-1",
        },
    )


ORIGINAL = {
    "event_time": "2019-10-01 00:00:00 UTC",
    "event_type": "cart",
    "product_id": "44600062",
    "category_id": "2103807459595387724",
    "category_code": "",
    "brand": "shiseido",
    "price": "35.79",
    "user_id": "541312140",
    "user_session": "s-1",
}


@pytest.mark.parametrize(
    "other",
    [
        {"Unnamed: 0": "17", **ORIGINAL},
        {"": "0", "Unnamed: 0.1": "3", **ORIGINAL},
        dict(reversed(ORIGINAL.items())),
        ORIGINAL | {"user_id": "541312140.0", "product_id": "44600062.0"},
        ORIGINAL | {"user_id": "5.4131214e+08", "category_id": "2.1038074595953877e+18"},
        ORIGINAL | {"price": "35.790", "category_code": "NaN"},
        ORIGINAL | {"price": " 35.79 ", "brand": " shiseido", "event_type": "cart "},
        ORIGINAL | {"event_time": "2019-10-01 00:00:00+00:00"},
    ],
    ids=["index", "two indexes", "order", "floats", "exponents", "nan", "blanks", "zone"],
)
def test_a_rees46_file_saved_again_tells_of_the_same_events(
    registry: Registry, tmp_path: Path, other: dict[str, str]
) -> None:
    def identities(name: str, *table: dict[str, str]) -> list[str]:
        path = tmp_path / name
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
        return [json.loads(message or b"")["event_id"] for _, message in messages(registry, path)]

    (first,) = identities("first.csv", ORIGINAL)
    # What is another event stays one.
    changes = {"user_id": "541312141", "price": "35.8", "event_time": "2019-10-01 00:00:01 UTC", "brand": ""}
    again, *others = identities(
        "again.csv", other, *(other | {name: value} for name, value in changes.items())
    )
    assert again == first
    assert len({first, *others}) == 1 + len(changes)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (json.dumps([VIEW, VIEW]), "a JSON array"),
        (json.dumps([VIEW, VIEW], indent=2), "a JSON array"),
        ("[\n" + ",\n".join([json.dumps(VIEW)] * 3) + "\n]\n", "a JSON array"),
        ("[" + ",\n".join([json.dumps(VIEW)] * 3000) + "]", "a JSON array"),
        ("[\n" + json.dumps(VIEW) + "\n]", "a JSON array"),
        ("[]", "a JSON array"),
        (json.dumps(VIEW, indent=2), "JSON of several lines an object"),
        ("\n".join([json.dumps(VIEW, indent=1)] * 500), "JSON of several lines an object"),
        ('{"event_id": "a",\n "viewer_id": 1,\n "watched_at": 0}', "JSON of several lines an object"),
    ],
)
@pytest.mark.parametrize("topic", [None, "view_events"])
def test_json_over_several_lines_is_refused_in_a_sentence(
    registry: Registry, tmp_path: Path, content: str, what: str, topic: str | None
) -> None:
    path = tmp_path / "views.json"
    path.write_text(content)
    with pytest.raises(
        EventFileError, match=rf"views\.json is {what}.*: write one object on each line.*jq -c"
    ):
        detect(path, registry, topic)


@pytest.mark.parametrize("first", ["[broken", "[1]", "[", "{broken", '[{"a": 1}]', "{", '{"a":' * 100_000])
def test_json_lines_stay_json_lines_whatever_their_first_line(
    registry: Registry, tmp_path: Path, first: str
) -> None:
    path = tmp_path / "views.jsonl"
    path.write_text("\n".join([first, json.dumps(VIEW), json.dumps(VIEW)]))
    assert messages(registry, path) == [
        (1, first.encode()), (2, json.dumps(VIEW).encode()), (3, json.dumps(VIEW).encode()),
    ]  # fmt: skip


@pytest.mark.parametrize("depth", [100_000, 300_000])
def test_deep_json_is_refused_in_a_sentence(registry: Registry, tmp_path: Path, depth: int) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text('{"a":' * depth + "\n")
    with pytest.raises(EventFileError, match="name the topic, one of"):
        detect(path, registry)


@pytest.mark.parametrize(
    ("record", "topic"),
    [
        ({"event_id": 1, "user_id": "u", "event_type": "view", "event_time": 1}, "user.events"),
        (VIEW, "view_events"),
        ({"event_id": 1, "viewer_id": 1, "event_type": "like", "event_ts": 1}, "content_interactions"),
        ({"item_id": "i", "brand": "b", "price": 1}, "items"),
    ],
)
def test_the_first_telling_record_names_the_topic(
    registry: Registry, tmp_path: Path, record: dict[str, object], topic: str
) -> None:
    path = tmp_path / "unnamed"
    path.write_bytes(b'\xef\xbb\xbf\n{broken\n{"item_id":"i","user_id":"u"}\n' + json.dumps(record).encode())
    assert detect(path, registry).topic.name == topic


@pytest.mark.parametrize(
    ("content", "options", "parts"),
    [
        (b"", {}, ["is empty"]),
        (b"\n \n", {}, ["is empty"]),
        (b"event_id,viewer_id,genre\n1,2,3\n", {}, ["lacks", "watched_at", "view_events", "rees46", "genre"]),
        (b"event_id,event_id\n1,2\n", {}, ["event_id", "twice"]),
        (b"a,b\n1,2\n", {"mapping": "rees46"}, ["lacks the REES46 columns", "product_id"]),
        (REES46.encode() + b"\n", {"topic": "items"}, ["REES46", "user.events", "items"]),
        (b'{"a":1}\n', {}, ["does not identify its topic", "keys a", "view_events"]),
        (b"PK\x03\x04....", {}, ["zip archive"]),
    ],
)
def test_what_is_no_file_of_events_is_named(
    registry: Registry, tmp_path: Path, content: bytes, options: dict[str, str], parts: list[str]
) -> None:
    path = tmp_path / "given.csv"
    path.write_bytes(content)
    with pytest.raises(EventFileError) as caught:
        messages(registry, path, **options)
    assert all(part in str(caught.value) for part in [str(path), *parts]), str(caught.value)


def test_a_missing_file_a_directory_and_an_unknown_topic(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(EventFileError, match="does not exist"):
        detect(tmp_path / "none", registry)
    with pytest.raises(EventFileError, match="is a directory"):
        detect(tmp_path, registry)
    path = tmp_path / "x.jsonl"
    path.write_text("{}")
    with pytest.raises(RegistryError, match="did you mean view_events"):
        detect(path, registry, topic="view_event")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-03-01T10:00:00Z", datetime(2026, 3, 1, 10, tzinfo=UTC)),
        ("2026-03-01 10:00:00.5", datetime(2026, 3, 1, 10, 0, 0, 500_000, tzinfo=UTC)),
        ("2026-03-01 10:00:00 UTC", datetime(2026, 3, 1, 10, tzinfo=UTC)),
        ("2026-03-01T10:00+02:00", datetime(2026, 3, 1, 8, tzinfo=UTC)),
        ("2026-03-01T10:00:00-0530", datetime(2026, 3, 1, 15, 30, tzinfo=UTC)),
        ("1772359200123", datetime(2026, 3, 1, 10, 0, 0, 123_000, tzinfo=UTC)),
        ("1772359200", datetime(2026, 3, 1, 10, tzinfo=UTC)),
        ("1772359200.1234567", datetime(2026, 3, 1, 10, 0, 0, 123_456, tzinfo=UTC)),
        ("1772359200123456", datetime(2026, 3, 1, 10, 0, 0, 123_456, tzinfo=UTC)),
        ("1772359200123456789", datetime(2026, 3, 1, 10, 0, 0, 123_456, tzinfo=UTC)),
        ("946684800", datetime(2000, 1, 1, tzinfo=UTC)),
        ("946684799", None),
        ("4133980799999", datetime(2100, 12, 31, 23, 59, 59, 999_000, tzinfo=UTC)),
        ("4133980800000", None),
        ("2026-11-28T10:00:00.1234567Z", datetime(2026, 11, 28, 10, 0, 0, 123_456, tzinfo=UTC)),
        ("2026-11-28t10:00:00.123456789z", datetime(2026, 11, 28, 10, 0, 0, 123_456, tzinfo=UTC)),
        ("2026-11-28T10:00:00.999999999+01:00", datetime(2026, 11, 28, 9, 0, 0, 999_999, tzinfo=UTC)),
        ("2026-11-28 10:00:00 utc", datetime(2026, 11, 28, 10, tzinfo=UTC)),
        ("0001-01-01T00:00:00Z", None),
        ("2101-01-01T00:00:00Z", None),
        ("2026-02-30T10:00:00Z", None),
        ("yesterday", None),
        ("", None),
    ],
)
def test_times_are_read_as_the_typed_layer_reads_them(text: str, expected: datetime | None) -> None:
    assert YEARS.parse(text) == expected


moments = st.datetimes(datetime(2032, 1, 1), datetime(2068, 1, 1))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


@given(
    moments,
    st.sampled_from(["%sZ", "%s UTC", "%s", "%s+02:00", *UNITS, "text"]),
    st.dictionaries(st.text(max_size=8) | st.just("nested"), values, max_size=4),
    st.integers(-(10**9), 10**9),
    st.sampled_from([None, 1]),
)
def test_a_shift_moves_the_time_and_nothing_else(
    topics: Mapping[str, Topic],
    moment: datetime,
    form: str,
    others: dict[str, object],
    seconds: int,
    indent: int | None,
) -> None:
    topic = topics["view_events"]
    microseconds = (moment - datetime(1970, 1, 1)) // timedelta(microseconds=1)
    numbers = {unit: microseconds * per_second // 10**6 for unit, per_second in UNITS.items()}
    texts: dict[str, object] = {**numbers, "text": str(numbers["ms"])}
    given = texts.get(form, form.replace("%s", moment.isoformat()))
    others = {name: value for name, value in others.items() if name != "watched_at"}
    original = {**others, "same": {"watched_at": "2026-01-01"}, "watched_at": given, "price": 1}
    message = json.dumps(original, indent=indent).encode()
    before = event_time(message, topic)
    moved = shift_message(message, topic, seconds)
    assert before is not None
    after = event_time(moved, topic)
    assert after == before + timedelta(seconds=seconds)
    changed = json.loads(moved)
    assert isinstance(changed["watched_at"], int) == isinstance(given, int)
    assert changed | {"watched_at": given} == original
    old = json.dumps(given).encode()
    cut = message.rindex(b'"watched_at": ' + old) + len(b'"watched_at": ')
    assert moved.startswith(message[:cut])
    assert moved.endswith(message[cut + len(old) :])


@pytest.mark.parametrize(
    ("given", "moved"),
    [
        (b"1772359200", b"1772362800"), (b"1772359200.50", b"1772362800.5"), (b'"1772359200000"', b'"1772362800000"'),
        (b"1.7723592e9", b"1772362800"), (b"1772359200000000000", b"1772362800000000000"),
        (b'"2026-03-01t10:00:00.1234567z"', b'"2026-03-01T11:00:00.123456Z"'),
        # Beyond the plausible years, before or after.
        (b"12345", b"12345"), (b"4133980799", b"4133980799"), (b'"0001-01-01T00:00:00Z"', b'"0001-01-01T00:00:00Z"'),
        (b"true", b"true"), (b"[1772359200]", b"[1772359200]"),
    ],
)  # fmt: skip
def test_a_shift_reads_a_time_as_the_typed_layer_does(
    topics: Mapping[str, Topic], given: bytes, moved: bytes
) -> None:
    message = b'{"watched_at": %s , "event_id": "e"}'
    assert shift_message(message % given, topics["view_events"], 3600) == message % moved


@given(st.binary(max_size=60))
def test_a_message_without_a_readable_time_is_not_touched(
    topics: Mapping[str, Topic], message: bytes
) -> None:
    for topic in topics.values():
        if event_time(message, topic) is None:
            assert shift_message(message, topic, 3600) == message
