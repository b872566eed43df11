"""Real-time preference and engagement profiles on RisingWave, dbt, DynamoDB, Iceberg and Dagster."""
