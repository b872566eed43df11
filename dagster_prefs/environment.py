"""The names of one environment's parts: the one rule by which several environments share engine, Kafka and AWS account.

`PREFS_ENVIRONMENT` gives all of them. A setting that names one of them differently contradicts it and is refused
(`settings.py`): otherwise a forgotten `PREFS_TABLE_PREFIX` would make a developer's environment write production's
items. bare dbt follows the same rule (`macros/engine/environment.sql`), and so does Terraform by its workspace.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Words of letters and digits joined by single underscores. As no name has a hyphen, each name has exactly one table
# prefix and consumer group, and the group `dagster-prefs-dev-7` belongs to `dev` and to no other environment.
NAME = re.compile(r"[a-z][a-z0-9]*(?:_[a-z0-9]+)*")
MOST_CHARACTERS = 20
# Schemas that an engine has itself, or that people use without an environment.
_RESERVED = frozenset({"public", "information_schema", "dbt", "default", "none", "training"})
_ENGINES = ("pg_", "rw_", "prefs_")
_PRODUCTION = ("production", "prod")
# The consumer group of a deployment without an environment.
CONSUMER_GROUP = "dagster-prefs"
# Key of the tag on DynamoDB tables, Dagster's assets and its runs that names the environment.
ENVIRONMENT_TAG = "prefs:environment"
DAGSTER_TAG = "prefs/environment"
NAMESPACE_SUFFIX = "_training"


class EnvironmentNameError(ValueError):
    """A name is not that of an environment; the message gives the rule and the remedy."""


@dataclass(frozen=True)
class Environment:
    """One environment, and the names of all that it makes. Raises EnvironmentNameError for an unsuitable name."""

    name: str

    def __post_init__(self) -> None:
        shown = repr(self.name[:40])
        if not NAME.fullmatch(self.name) or len(self.name) > MOST_CHARACTERS:
            raise EnvironmentNameError(
                f"{shown} is not an environment: 1 to {MOST_CHARACTERS} of a-z, 0-9 and single `_`, beginning with a "
                "letter; write e.g. dev_anna, pr_123, staging or production"
            )
        if self.name in _RESERVED or self.name.startswith(_ENGINES):
            raise EnvironmentNameError(
                f"{shown} is reserved, because the environment's schema has its name: write e.g. dev_{self.name[:16]}"
            )

    @property
    def schema(self) -> str:
        """The engine's schema with every relation, sink and subscription."""
        return self.name

    @property
    def table_prefix(self) -> str:
        """The prefix of the DynamoDB tables; the same as Terraform's for this environment."""
        return self.name.replace("_", "-") + "-"

    @property
    def namespace(self) -> str:
        """The Iceberg namespace of the training tables; the same as Terraform's for this environment."""
        return self.name + NAMESPACE_SUFFIX

    @property
    def consumer_group(self) -> str:
        """Kafka's consumer group; RisingWave's sources append their own number to it."""
        return f"{CONSUMER_GROUP}-{self.name}"

    @property
    def workspace(self) -> str:
        """The Terraform workspace."""
        return self.name

    @property
    def dagster_tags(self) -> dict[str, str]:
        """The tags of its assets, jobs and runs in Dagster."""
        return {DAGSTER_TAG: self.name}

    @property
    def is_production(self) -> bool:
        """Whether its name begins with the word production or prod."""
        return self.name.split("_")[0] in _PRODUCTION

    def owns_group(self, group: str) -> bool:
        """Return whether a consumer group is this environment's: its own, or one that RisingWave numbered."""
        return re.fullmatch(re.escape(self.consumer_group) + r"(-\d+)*", group) is not None


def environment_named(name: str) -> Environment | None:
    """Return the environment of this name, None if it is the name of none."""
    try:
        return Environment(name)
    except EnvironmentNameError:
        return None
