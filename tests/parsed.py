"""What dbt has parsed once in a run of the suite, for every other database and folder that parses the same.

dbt keeps what it parsed in the target folder, and parses everything again where the folder is new or the connection
another: two to three seconds of CPU for each database of a test. What it would parse differs only by the names of the
database and the schema, so that what another process parsed is taken, renamed, wherever the folder has nothing that
dbt can use. dbt then compares all files and variables with it, as with its own. `DBT_PARTIAL_PARSE=false` switches it
off.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
from pathlib import Path
from typing import Any

from dbt.contracts.graph.manifest import Manifest
from dbt.flags import get_flags
from dbt.parser.manifest import ManifestLoader, extended_mashumuro_decoder


def share_parsed(store: Path) -> None:
    """Let dbt in this process and its forks read from and add to a folder of parsed projects."""
    read, write = (
        ManifestLoader.read_manifest_for_partial_parse,
        ManifestLoader.write_manifest_for_partial_parse,
    )

    def read_here_or_there(loader: ManifestLoader) -> Manifest | None:
        found = read(loader)
        if found is None and get_flags().PARTIAL_PARSE and (there := _place(store, loader)).is_file():
            return _taken(there, loader)
        return found

    def write_here_and_there(loader: ManifestLoader) -> None:
        write(loader)
        there = _place(store, loader)
        if get_flags().PARTIAL_PARSE and not loader.partially_parsing and not there.exists():
            unfinished = there.with_suffix(f".{os.getpid()}")
            here = Path(loader.root_project.project_target_path, "partial_parse.msgpack")
            unfinished.write_bytes(pickle.dumps((_names(loader), here.read_bytes())))
            unfinished.rename(there)

    ManifestLoader.read_manifest_for_partial_parse = read_here_or_there
    ManifestLoader.write_manifest_for_partial_parse = write_here_and_there


def _place(store: Path, loader: ManifestLoader) -> Path:
    """The file of all that dbt compares as a whole, apart from the connection: projects, target, variables."""
    check = loader.manifest.state_check
    whole = repr((check.vars_hash, check.project_env_vars_hash, sorted(check.project_hashes.items())))
    return store / f"{hashlib.sha256(whole.encode()).hexdigest()}.parsed"


def _names(loader: ManifestLoader) -> tuple[str, str]:
    credentials = loader.root_project.credentials
    return credentials.database, credentials.schema


def _taken(there: Path, loader: ManifestLoader) -> Manifest:
    names, packed = pickle.loads(there.read_bytes())
    manifest: Manifest = Manifest.from_msgpack(packed, decoder=extended_mashumuro_decoder)
    manifest.state_check = loader.manifest.state_check
    manifest.metadata = loader.manifest.metadata
    (database, schema), (new_database, new_schema) = names, _names(loader)

    def rename(node: Any) -> None:
        if getattr(node, "database", None) == database:
            node.database = new_database
        if getattr(node, "schema", None) == schema:
            node.schema = new_schema
        if getattr(node, "relation_name", None):
            old, new = f'"{database}"."{schema}".', f'"{new_database}"."{new_schema}".'
            node.relation_name = node.relation_name.replace(old, new)

    if names != _names(loader):
        for node in itertools.chain(
            manifest.nodes.values(), manifest.sources.values(), *manifest.disabled.values()
        ):
            rename(node)
    return manifest
