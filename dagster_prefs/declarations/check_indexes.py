"""Check that every row fits into every declared index, even with the longest texts that its columns may hold."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dagster_prefs.declarations.check_topics import ID_BYTES, INDEX_BYTES, NAME_BYTES, Topic
from dagster_prefs.declarations.check_views import references
from dagster_prefs.declarations.findings import Findings, is_whole
from dagster_prefs.declarations.read import ColumnYaml, Map, ModelYaml

# Bytes of a value in a PostgreSQL index; a decimal has at most 28 digits. All other types are texts.
_WIDTHS = {
    "bigint": 8, "int": 4, "integer": 4, "smallint": 2, "boolean": 1, "date": 4, "timestamptz": 8,
    "timestamp": 8, "double precision": 8, "decimal": 24, "numeric": 24,
}  # fmt: skip
# Overhead in bytes of a row, and of each of its texts; a value is aligned to 8 bytes in the worst case.
_ROW_HEADER, _TEXT_HEADER, _ALIGNMENT = 8, 4, 8


def check_indexes(findings: Findings, topics: Sequence[Topic]) -> None:
    """Note every index with a row that may exceed PostgreSQL's limit: one such event would stop its view.

    A text is as long as its column's `max_bytes`; without one, as the fields of that name in the topics that the model
    reads; else as the default of a field. RisingWave has no such limit, but the models serve both engines.
    """
    by_relation = {topic.declared.relation: topic for topic in topics}
    for model in findings.project.models:
        indexes = model.config.get("indexes")
        for index in indexes if isinstance(indexes, list) else []:
            if not isinstance(index, Map) or not isinstance(index.get("columns"), list):
                continue
            read = [by_relation[name] for name in _upstream(findings, model.name) if name in by_relation]
            columns = [model.columns[name] for name in map(str, index["columns"]) if name in model.columns]
            texts = {
                column.name: _longest(findings, column, read)
                for column in columns
                if _type(column) not in _WIDTHS
            }
            widths = [
                _aligned(
                    _TEXT_HEADER + texts[column.name] if column.name in texts else _WIDTHS[_type(column)]
                )
                for column in columns
            ]
            if (size := _ROW_HEADER + sum(widths)) > INDEX_BYTES:
                _say(findings, model, index, texts, size)


def _say(findings: Findings, model: ModelYaml, index: Map, texts: dict[str, int], size: int) -> None:
    longest = ", ".join(f"{name} {limit}" for name, limit in texts.items())
    findings.say(
        model.file,
        index.line,
        f"{model.name}: a row of the index on {', '.join(map(str, index['columns']))} may have {size} bytes "
        f"(texts of up to {longest}), and an index of PostgreSQL takes {INDEX_BYTES}: lower max_bytes of a field in "
        "its topic, or of the column here where the view computes it",
        f"- {{ name: {max(texts, key=texts.__getitem__)}, …, config: {{ meta: {{ max_bytes: {ID_BYTES} }} }} }}",
    )


def _longest(findings: Findings, column: ColumnYaml, read: Sequence[Topic]) -> int:
    limit = column.meta.get("max_bytes")
    if is_whole(limit):
        return limit
    fields = [topic.declared.by_name[column.name] for topic in read if column.name in topic.declared.by_name]
    limits = [
        field.max_bytes or max((len(one.encode()) for one in field.accepted), default=NAME_BYTES)
        for field in fields
    ]
    is_key = any(column.name == key.name for entity in findings.entities.values() for key in entity.keys)
    return max(limits, default=ID_BYTES if is_key else NAME_BYTES)


def _upstream(findings: Findings, model: str) -> set[str]:
    """Return the relations that a model reads, itself included, by the references in the hand-written SQL."""
    found, todo = {model}, [model]
    while todo:
        read = set(references(findings.project.sql(todo.pop()) or "")) - found
        found |= read
        todo += read
    return found


def _type(column: ColumnYaml) -> str:
    return re.sub(r"\(.*?\)", "", column.type).strip()


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
