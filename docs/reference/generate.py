"""Write the pages of the reference from the code: `make reference`, or with `--check` say which are out of date."""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import click
from prometheus_client.core import Metric
from starlette.requests import Request
from starlette.routing import Route

from dagster_prefs import serving
from dagster_prefs.cli import cli
from dagster_prefs.declarations import (
    check,
    check_domains,
    check_drift,
    check_tiles,
    check_topics,
    check_views,
)
from dagster_prefs.declarations.findings import EXAMPLES, KEY_SQL_TYPES
from dagster_prefs.declarations.registry import FieldType, Registry, load_registry
from dagster_prefs.engine.connection import EngineConfiguration
from dagster_prefs.freshness.metrics import LEVEL_METRIC, METRICS, STATUS_METRICS
from dagster_prefs.freshness.values import VALUE_METRICS
from dagster_prefs.serving import ShopClient
from dagster_prefs.serving.connections import ConnectionLimits, Connections
from dagster_prefs.serving.observing import ReadCounts
from dagster_prefs.serving.openapi import openapi
from dagster_prefs.serving.prometheus import ReadCollector
from dagster_prefs.serving.server import Watched, make_app
from dagster_prefs.serving.wire import Metrics
from dagster_prefs.settings import KAFKA_TOPIC, PROJECT_ROOT, Settings, known_variables

FOLDER = Path(__file__).parent
COMMAND = "make reference"
NOTE = f"<!-- Written by `{COMMAND}` from the code: edit the code instead. -->\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; a bar in a cell is escaped."""
    shown = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [heads, ["---"] * len(heads), *shown]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def code(value: object) -> str:
    """Return text as a code span, empty for no text."""
    text = str(value)
    return f"`{text}`" if text else ""


# Settings


def settings_page() -> str:
    """Return every setting in the order and the sections of .env.example."""
    variables = known_variables()
    sections: dict[str, list[tuple[str, str, str]]] = {}
    section = ""
    for line in (PROJECT_ROOT / ".env.example").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        found = re.match(r"#([A-Z_]+)=(.*)$", line)
        if found and found[1] in variables:
            field = Settings.model_fields[variables[found[1]]]
            values = [value for value in get_args(field.annotation) if isinstance(value, str)]
            one_of = f" One of {', '.join(map(code, values))}." if values else ""
            text = f"{field.description}{one_of}"
            sections.setdefault(section, []).append((code(found[1]), code(found[2]), text))
        elif found and found[1].startswith(KAFKA_TOPIC) and not _listed(sections[section]):
            description = str(Settings.model_fields["kafka_topic_names"].description)
            sections[section].append((code(f"{KAFKA_TOPIC}<NAME>"), "the topic's name", description))
    parts = [
        "# Settings\n",
        "Every setting is an environment variable, or a line of `.env` next to the project. The environment goes "
        "before `.env`; an unknown `PREFS_` name is refused at start. `PREFS_ENV_FILE`, in the environment only, "
        "names another file than `.env`. AWS credentials come from the usual sources of botocore (`AWS_PROFILE`, "
        "`AWS_ACCESS_KEY_ID`, roles).\n",
    ]
    for name, rows in sections.items():
        parts += [f"## {name}\n", table(("variable", "default", "meaning"), rows)]
    return "\n".join(parts)


def _listed(rows: Sequence[tuple[str, str, str]]) -> bool:
    return any(KAFKA_TOPIC in variable for variable, _, _ in rows)


# Commands


def cli_page() -> str:
    """Return every command with its arguments and options."""
    parts = [
        "# Commands\n",
        "Every command has `--help`. A command that fails prints one line to stderr that says what to do. It exits "
        "with 1, with 2 for a usage error, and with 130 after Ctrl-C; a command with other exit codes says so below.\n",
    ]
    context = click.Context(cli, info_name="prefs", **cli.context_settings)
    for name, command in sorted(_commands(cli, context)):
        parts += [f"## {name}\n", *_command(name, command, context)]
    return "\n".join(parts)


def _commands(
    group: click.Group, context: click.Context, path: str = "prefs"
) -> Iterator[tuple[str, click.Command]]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is None or command.hidden:
            continue
        if isinstance(command, click.Group):
            if command.invoke_without_command:
                yield f"{path} {name}", command
            yield from _commands(command, context, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def _command(name: str, command: click.Command, context: click.Context) -> Iterator[str]:
    pieces = command.collect_usage_pieces(click.Context(command, info_name=name, parent=context))
    yield f"    {' '.join([name, *pieces])}\n"
    yield f"{inspect.cleandoc(command.help or '')}\n"
    rows = []
    for option in command.params:
        if not isinstance(option, click.Option) or option.hidden:
            continue
        names = ", ".join([*option.opts, *option.secondary_opts])
        record = option.get_help_extra(context)
        notes = [f"default {record['default']}"] if option.show_default and "default" in record else []
        if isinstance(option.type, click.Choice):
            notes.append(f"one of {', '.join(map(str, option.type.choices))}")
        if option.required:
            notes.append("required")
        if option.multiple:
            notes.append("may be repeated")
        value = "" if option.is_flag else f" {option.make_metavar(context)}"
        rows.append(
            (code(f"{names}{value}"), (option.help or "") + (f" ({'; '.join(notes)})" if notes else ""))
        )
    if rows:
        yield table(("option", "meaning"), rows)


# Declarations


def declarations_page() -> str:
    """Return the keys of every declaration; docs/declarations.md explains them."""
    page, drift = "../declarations.md", "../values.md#when-values-have-drifted"
    kinds: tuple[tuple[str, str, Sequence[str], str], ...] = (
        ("Entities", "`vars: entities: NAME` of `dbt_project.yml`", check.ENTITY_KEYS, f"{page}#entities"),
        ("Topics", "`meta.topic` of a model", check_topics.TOPIC_KEYS, f"{page}#topics"),
        ("Fields of a topic", "`meta` of a column", check_topics.FIELD_META, f"{page}#topics"),
        ("Tiles", "`meta.tile` of a model", check_tiles.TILE_KEYS, f"{page}#tiles"),
        ("Columns of a tile", "`meta` of a column", check_tiles.TILE_META, f"{page}#tiles"),
        ("Drift of a tile", "`meta.tile.drift`", check_drift.TILE_DRIFT_KEYS, drift),
        ("Drift of a column", "`meta.drift` of a column", check_drift.COLUMN_DRIFT_KEYS, drift),
        ("Domains", "`meta.domain` of a model", check_domains.DOMAIN_KEYS, f"{page}#domains"),
        ("The contract", "`meta.contract` of one exposure", check_domains.HEAD_KEYS, f"{page}#domains"),
        ("Preference views", "`meta.preference` of a model", check_views.PREFERENCE_KEYS, f"{page}#preference-views"),
        ("Kept views", "`meta.keep` of a model", check_views.KEEP_KEYS, f"{page}#how-a-view-is-kept-current"),
    )  # fmt: skip
    examples = {"Topics": "topic", "Tiles": "tile", "Domains": "domain", "Preference views": "preference"}
    parts = [
        "# Declarations\n",
        "The keys that `prefs generate` accepts; every other key is refused with the file, the line and a correct "
        "example. `meta` stands in `config`. [Declare a business](../declarations.md) explains each key.\n",
        table(
            ("declaration", "written in", "keys"),
            [
                (f"[{kind}]({link})", place, ", ".join(map(code, keys)))
                for kind, place, keys, link in kinds
            ],
        ),
        "## Examples\n",
        "These are the examples of the error messages.\n",
        *(f"    {EXAMPLES[key]}\n" for key in examples.values()),
        "## Types and limits\n",
        table(
            ("what", "value"),
            _limits(),
        ),
    ]  # fmt: skip
    return "\n".join(parts)


def _limits() -> list[tuple[str, str]]:
    limits = check_topics
    keys = ", ".join(f"`{kind}` (`{sql}`)" for kind, sql in KEY_SQL_TYPES.items())
    texts = f"{limits.ID_BYTES}, {limits.NAME_BYTES:,} unless `max_bytes` says otherwise"
    messages = f"{limits.MAX_MESSAGE_BYTES:,} unless `max_message_bytes` says otherwise"
    return [
        ("type of a key of an entity (its column in SQL)", keys),
        ("`data_type` of a topic's field", ", ".join(map(code, get_args(FieldType)))),
        ("names that no field may have", ", ".join(map(code, sorted(limits.RESERVED_FIELDS)))),
        ("bytes of a text: of an identity or key, of any other", texts),
        ("bytes of a message", messages),
        ("bytes of a row of an index", f"{limits.INDEX_BYTES:,}"),
        ("bytes of a partition key", f"{limits.PARTITION_KEY_BYTES:,}"),
        (
            "digits of a decimal, places of it",
            f"{limits.DIGITS}, {limits.DEFAULT_SCALE} unless `scale` says otherwise",
        ),
    ]


# The Python client


def python_page() -> str:
    """Return signatures and docstrings of what `dagster_prefs.serving` exports."""
    parts = [
        "# Python client\n",
        "`from dagster_prefs.serving import …`. [Serving](../serving.md) explains what a read promises. The classes of "
        "a project's own domains are made from its registry, or written by `prefs generate client FILE`.\n",
    ]
    for name in serving.__all__:
        parts += [f"## {name}\n", *_class(getattr(serving, name))]
    return "\n".join(parts)


def _class(found: type[Any]) -> Iterator[str]:
    if is_dataclass(found):
        yield f"    {found.__name__}({', '.join(field.name for field in fields(found))})\n"
    else:
        yield f"    {found.__name__}{_signature(found)}\n"
    yield f"{inspect.getdoc(found) or ''}\n"
    if is_dataclass(found):
        rows = [(code(field.name), code(field.type), code(_default(field))) for field in fields(found)]
        yield table(("field", "type", "default"), rows)
    for name, member in sorted(vars(found).items()):
        if name.startswith("_"):
            continue
        function = member.fget if isinstance(member, property) else member
        if not inspect.isfunction(function):
            continue
        signature = "" if isinstance(member, property) else _signature(function)
        yield f"### {found.__name__}.{name}\n"
        yield f"    {'await ' if inspect.iscoroutinefunction(function) else ''}{name}{signature}\n"
        yield f"{inspect.getdoc(function) or ''}\n"


def _signature(function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    shown = [
        one.replace(default=_Shown.default(one.default), annotation=_Shown(one.annotation))
        for name, one in signature.parameters.items()
        if name != "self"
    ]
    return str(signature.replace(parameters=shown, return_annotation=_Shown(signature.return_annotation)))


class _Shown:
    """A default or an annotation as it is to be shown."""

    def __init__(self, text: str) -> None:
        self._text = text

    @classmethod
    def default(cls, value: Any) -> Any:
        """Return a default whose repr holds no address of memory."""
        if is_dataclass(value):
            return cls(f"{type(value).__name__}()")
        if callable(value) and value is not inspect.Parameter.empty:
            return cls(f"{value.__module__}.{value.__name__}")
        return value

    def __repr__(self) -> str:
        return self._text


def _default(field: Any) -> str:
    if field.default is not MISSING:
        return repr(field.default)
    return (
        "" if field.default_factory is MISSING else f"{getattr(field.default_factory, '__name__', 'made')}()"
    )


# HTTP


def http_page() -> str:
    """Return the requests of the feature server for the shipped example."""
    registry = load_registry(PROJECT_ROOT / "dbt_project")
    document = openapi(_served(registry), version=registry.contract.version, preferences=True)
    parts = [
        "# HTTP\n",
        "The requests of `prefs serve` for the shipped example; those of a project have its own entities and domains. "
        "The server serves the same as OpenAPI 3.0 at `/openapi.json`. [Serving](../serving.md#over-http) explains "
        "values, sizes, times and errors.\n",
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts += [f"## {method.upper()} {path}\n", *_operation(operation)]
    parts += ["## Answers\n"]
    for name, schema in sorted(document["components"]["schemas"].items()):
        if properties := schema.get("properties"):
            required = schema.get("required", ())
            rows = [
                (code(key), _schema(value), "yes" if key in required else "no", value.get("description", ""))
                for key, value in properties.items()
            ]
            parts += [f"### {name}\n", table(("property", "type", "always", "meaning"), rows)]
    return "\n".join(parts)


def _served(registry: Registry) -> list[tuple[Any, Any]]:
    return [
        (entity, domains)
        for entity in registry.entities.values()
        if (domains := registry.contract.domains_of(entity.name))
    ]


def _operation(operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"{operation['summary']}.\n"
    if rows := [
        (code(one["name"]), one["in"], _schema(one["schema"]), one["schema"].get("description", ""))
        for one in operation.get("parameters", ())
    ]:
        yield table(("parameter", "in", "type", "meaning"), rows)
    if "requestBody" in operation:
        yield f"The body is {_content(operation['requestBody'])}.\n"
    yield table(
        ("status", "meaning", "answer"),
        [
            (status, answer["description"], _content(answer))
            for status, answer in operation["responses"].items()
        ],
    )


def _content(answer: Mapping[str, Any]) -> str:
    schemas = [one["schema"] for one in answer.get("content", {}).values() if "schema" in one]
    return _schema(schemas[0]) if schemas else "text"


def _schema(schema: Mapping[str, Any]) -> str:
    """Return the type of a value in a few words, with what bounds it."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for key in ("oneOf", "anyOf", "allOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(map(_schema, schema[key])))
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"list of {_schema(schema['items'])}"
    if "enum" in schema:
        kind = ", ".join(code(value) for value in schema["enum"])
    notes = [
        f"{word} {schema[key]:,}" for key, word in (("minimum", "from"), ("maximum", "to")) if key in schema
    ]
    notes += [f"default {json.dumps(schema['default'])}"] if "default" in schema else []
    notes += ["or null"] if schema.get("nullable") else []
    return f"{kind} ({', '.join(notes)})" if notes else kind


# Metrics


def metrics_page() -> str:
    """Return every metric of `prefs metrics` and of the feature server."""
    heads = ("metric", "type", "labels", "meaning")
    own = [(one, "stage, name") for one in METRICS]
    own += [(LEVEL_METRIC, "stage, name, level"), *((one, "") for one in STATUS_METRICS)]
    quantile = "prefs_values_quantile"
    values = [
        (code(name), "gauge", f"relation, attribute{', quantile' if name == quantile else ''}", text)
        for name, text in VALUE_METRICS.items()
    ]
    clients, server = asyncio.run(_server_metrics())
    return "\n".join(
        (
            "# Metrics\n",
            "In Prometheus' text format. `infra/prometheus/rules.yml` has alert rules for them, `infra/grafana` "
            "dashboards ([how](../operations.md#see-it-from-outside)).\n",
            "## prefs metrics\n",
            "Served by `prefs metrics` at `/metrics`. A reading that failed has no sample.\n",
            table(heads, [(code(one.name), one.kind, labels, one.help) for one, labels in own]),
            "## Statistics of values\n",
            "On the same page: [what values are like](../values.md).\n",
            table(heads, values),
            "## Clients\n",
            "On the page of the feature server, or of a service that registers a "
            "[ReadCollector](../serving.md#watch-the-reads).\n",
            table(heads, clients),
            "## Feature server\n",
            table(heads, server),
        )
    )


async def _server_metrics() -> tuple[list[tuple[str, str, str, str]], list[tuple[str, str, str, str]]]:
    """Return the metrics of reads and the server's own, as an idle server with a catalogue shows them."""
    app = make_app(
        [], ShopClient(EngineConfiguration("127.0.0.1", 1, "none", "none")), watched=Watched(ReadCounts())
    )
    app.state.connections = Connections(ConnectionLimits())
    (endpoint,) = [one.endpoint for one in app.routes if isinstance(one, Route) and one.path == "/metrics"]
    answer = await endpoint(Request({"type": "http", "app": app}))
    helps = dict(re.findall(r"^# HELP (\S+) (.+)$", bytes(answer.body).decode(), re.M))
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", bytes(answer.body).decode(), re.M))
    families: list[Metric] = [*ReadCollector(ReadCounts()).collect(), *Metrics()._families(())]
    # A family without samples shows no labels.
    labels = {
        name: ", ".join(one._labelnames) for one in families for name in (one.name, f"{one.name}_total")
    }
    rows = [(code(name), kinds[name], labels.get(name, ""), text) for name, text in helps.items()]
    return [row for row in rows if "prefs_read" in row[0]], [row for row in rows if "prefs_server" in row[0]]


PAGES: Mapping[str, Callable[[], str]] = {
    "settings.md": settings_page,
    "cli.md": cli_page,
    "declarations.md": declarations_page,
    "python.md": python_page,
    "http.md": http_page,
    "metrics.md": metrics_page,
}


def stale_pages() -> dict[str, str]:
    """Return name → text of the pages that are not what the code says."""
    wanted = {name: NOTE + page() for name, page in PAGES.items()}
    return {
        name: text
        for name, text in wanted.items()
        if not (FOLDER / name).is_file() or (FOLDER / name).read_text(encoding="utf-8") != text
    }


def main() -> None:
    """Write the pages that are out of date, or with `--check` exit with 1 and name them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 naming the pages out of date"
    )
    checked = parser.parse_args().check
    stale = stale_pages()
    for name, text in stale.items():
        if not checked:
            (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"{'out of date' if checked else 'wrote'}: docs/reference/{name}")
    if checked and stale:
        sys.exit(f"run `{COMMAND}`")


if __name__ == "__main__":
    main()
