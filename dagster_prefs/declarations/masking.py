"""What is shown of personal values: on screens, in logs and in metadata they are masked.

Which columns are personal is decided in `personal.py`. Of the content of a message every personal field is masked, and
what the topic does not declare, since it may be anything; a message that is no JSON object is masked whole. Of the rows
about one id, which the reader named, its key and the identities of its events stay. `prefs rejected export` shows
messages as they are, in a file that only its owner may read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from dagster_prefs.declarations.registry import Registry, TopicDeclaration, personal_keys

MASK = "•••"
# A name that a producer may have misspelt is shown, any other text in its place is not.
_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


def masked_message(registry: Registry, topic: TopicDeclaration | None, message: str) -> str:
    """Return a message's text with its personal values masked; `topic` is None if the project has it no longer."""
    try:
        content = json.loads(message)
    except (ValueError, RecursionError):
        content = None
    if topic is None or not isinstance(content, dict):
        return f"{MASK} ({len(message.encode('utf-8', 'replace')):,} bytes)"
    return json.dumps(
        {
            name if _FIELD.fullmatch(name) else MASK: value
            if _is_open(registry, topic, name, value)
            else MASK
            for name, value in content.items()
        },
        ensure_ascii=False,
    )


def _is_open(registry: Registry, topic: TopicDeclaration, name: str, value: Any) -> bool:
    """Return whether a message's value may be shown: a scalar of a declared field that is not personal."""
    if name not in topic.by_name or registry.is_personal(topic.relation, name):
        return False
    return not isinstance(value, dict | list)


def masked_row(registry: Registry, relation: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row about one id with its personal values masked, except its key and the identity of an event."""
    named = personal_keys(registry.entities) | {
        topic.identity for topic in registry.topics.values() if topic.relation == relation
    }
    return {
        name: value if name in named or value is None or not registry.is_personal(relation, name) else MASK
        for name, value in row.items()
    }
