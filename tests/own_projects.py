"""Projects of one's own in tests: generated without dbt, from a wheel that is built once."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from dagster_prefs.declarations.generate import generate_files
from dagster_prefs.declarations.lineage import read_lineage
from dagster_prefs.declarations.registry import load_registry

ROOT = Path(__file__).resolve().parents[1]


def generate(project: Path) -> list[str]:
    """Generate everything, with the shipped project's compiled queries: to compile others takes dbt."""
    shipped = ROOT / "dbt_project"
    known = {**load_registry(shipped).queries, **read_lineage(shipped).queries}

    def compiled(folder: Path, relations: Sequence[str]) -> Mapping[str, str]:
        return {relation: known.get(relation, "select 1") for relation in relations}

    return generate_files(project, compiled)


def build_wheel(folder: Path, root: Path = ROOT) -> zipfile.ZipFile:
    """Build the wheel of this checkout, or of another folder, without the network."""
    from hatchling.builders.wheel import WheelBuilder

    return zipfile.ZipFile(next(WheelBuilder(str(root)).build(directory=str(folder), versions=["standard"])))


def build_source(folder: Path) -> Path:
    """Build the source package of this checkout, unpack it, and return its folder."""
    from hatchling.builders.sdist import SdistBuilder

    built = next(SdistBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"]))
    with tarfile.open(built) as archive:
        archive.extractall(folder, filter="data")
    return folder / Path(built).name.removesuffix(".tar.gz")


def contents(folder: Path) -> dict[str, bytes]:
    """Path → content of every file, to compare a folder with itself later."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
