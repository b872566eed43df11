"""Real-time preference and engagement profiles on RisingWave, dbt, DynamoDB, Iceberg and Dagster."""

# The version of the package; the build reads it from here, and a project's shared macros are stamped with it.
__version__ = "0.1.0"
