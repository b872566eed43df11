"""Source code of typed clients, written by `prefs generate client` for services that want types."""

from __future__ import annotations

import json
from collections.abc import Iterator

from dagster_prefs.declarations.contract import Contract, Domain
from dagster_prefs.serving.domains import class_name, may_be_none, python_type
from dagster_prefs.serving.profiles import key_places

# The command that wrote the file, for its head and for messages about outdated files.
COMMAND = "prefs generate client"

_HEAD = '''"""Typed profiles of version {version} of the serving contract. Written by `{command}`; do not edit.

{clients}
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass{field}
{decimal}from typing import TYPE_CHECKING, Unpack

from dagster_prefs.serving.profiles import AsyncProfileClient, Profile, ProfileClient, ReadOptions

'''

_ZEROS = {"int": "0", "Decimal": "Decimal(0)", "float": "0.0", "str": '""'}

_CLIENT = '''

class {client}({base}):
    """Reads the profiles of entity {entity}; otherwise as {base}."""

    {made} = {value}

    if TYPE_CHECKING:

        {prefix}def get(
            self, id_: {id}, /, domains: Sequence[str] | None = None, **options: Unpack[ReadOptions]
        ) -> {profile}: ...

        {prefix}def get_many(
            self, ids: Iterable[{id}], /, domains: Sequence[str] | None = None, **options: Unpack[ReadOptions]
        ) -> dict[{id}, {profile}]: ...
'''


def render_client(contract: Contract) -> str:
    """Return a Python module with the frozen classes of each entity's profiles, and their clients."""
    entities = [(entity, contract.domains_of(entity)) for entity in contract.tables]
    clients = [class_name(entity).removesuffix("Profile") for entity, _ in entities]
    body = "".join(part for entity, domains in entities for part in _entity(contract, entity, domains))
    head = _HEAD.format(
        version=contract.version,
        command=COMMAND,
        clients="\n".join(
            f'client = {name}Client("registry.json", region="eu-central-1")' for name in clients
        ),
        field=", field" if "field(default_factory" in body else "",
        decimal="from decimal import Decimal\n" if "Decimal" in body else "",
    )
    return head + "\n" + body.lstrip("\n")


def _entity(contract: Contract, entity: str, domains: tuple[Domain, ...]) -> Iterator[str]:
    for domain in domains:
        yield _domain(domain)
    columns = contract.tables[entity].columns
    kinds = ["int" if key.type == "N" else "str" for key in columns]
    names = tuple(key.name for key in columns)
    key, id_ = (names[0], kinds[0]) if len(names) == 1 else (names, f"tuple[{', '.join(kinds)}]")
    profile = _profile_name(entity, domains)
    made = "".join(f'        "{domain.name}": {class_name(domain.name)},\n' for domain in domains)
    yield (
        f"\n\nclass {profile}(Profile):\n"
        f'    """One {entity}\'s domains."""\n\n'
        "    __slots__ = ()\n"
        f'    entity = "{entity}"\n'
        f"    key = {json.dumps(key) if isinstance(key, str) else '(' + json.dumps(key)[1:-1] + ')'}\n"
        f"    classes = {{  # noqa: RUF012\n{made}    }}\n"
    )
    for name, place in key_places(key):
        value = "self.id" if place is None else f"self.id[{place}]"
        yield _property(name, kinds[place or 0], value, "Whose profile it is.")
    for domain in domains:
        yield _property(domain.name, class_name(domain.name), f'self.domain("{domain.name}")', _line(domain))
    name = class_name(entity).removesuffix("Profile")
    shared = {"entity": entity, "id": id_, "profile": profile}
    yield _CLIENT.format(
        client=f"{name}Client", base="ProfileClient", made="profile_class", value=profile, prefix="", **shared
    )
    yield _CLIENT.format(
        client=f"Async{name}Client",
        base="AsyncProfileClient",
        made="client_class",
        value=f"{name}Client",
        prefix="async ",
        **shared,
    )


def _profile_name(entity: str, domains: tuple[Domain, ...]) -> str:
    """Return the class name of the profiles; a domain may have the entity's name."""
    name = class_name(entity)
    return f"{name}s" if name in {class_name(domain.name) for domain in domains} else name


def _domain(domain: Domain) -> str:
    lines = [
        f"\n\n@dataclass(frozen=True, slots=True)\nclass {class_name(domain.name)}:\n"
        f'    """{_line(domain)}"""\n'
    ]
    for name, attribute in domain.attributes.items():
        _, python = python_type(attribute)
        if may_be_none(name, attribute):
            declared = f"{python} | None = None"
        elif attribute.is_list:
            declared = f"{python} = field(default_factory=list)"
        else:
            declared = f"{python} = {_ZEROS[python]}"
        lines.append(f"\n    {name}: {declared}\n")
        if attribute.description:
            lines.append(f'    """{_escaped(attribute.description)}"""\n')
    return "".join(lines)


def _property(name: str, kind: str, value: str, told: str) -> str:
    return (
        f"\n    @property\n    def {name}(self) -> {kind}:\n"
        f'        """{told}"""\n'
        f"        found: {kind} = {value}\n        return found\n"
    )


def _line(domain: Domain) -> str:
    return _escaped(f"{domain.key}: {domain.description}".strip())


def _escaped(text: str) -> str:
    """Escape a text for use between triple quotes."""
    return " ".join(text.split()).replace("\\", "\\\\").replace('"', '\\"')
