# The Dagster code location; webserver and daemon run from the same image with another command.
# Build from the root of the project: docker build -f infra/docker/code-location.Dockerfile -t prefs .
FROM python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d AS base

FROM base AS packages
COPY infra/locks/uv.txt /uv.txt
RUN pip install --no-cache-dir --require-hashes -r /uv.txt
COPY infra/docker/code-location.lock /code-location.lock
RUN python -m venv --without-pip /opt/venv \
    && uv pip sync --no-cache --compile-bytecode --require-hashes --python /opt/venv/bin/python /code-location.lock

FROM base
RUN groupadd --gid 10001 prefs \
    && useradd --uid 10001 --gid prefs --no-create-home --home-dir /var/lib/prefs --shell /usr/sbin/nologin prefs \
    && install --directory --owner=prefs --group=prefs --mode=0700 /var/lib/prefs
COPY --from=packages /opt/venv /opt/venv
# The process must not be able to change its code or configuration, so they belong to root.
COPY infra/dagster/dagster.yaml workspace.yaml /opt/dagster/
COPY dbt_project /app/dbt_project
COPY dagster_prefs /app/dagster_prefs
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DAGSTER_HOME=/opt/dagster \
    PREFS_DATA_DIR=/var/lib/prefs \
    PREFS_PROJECT_DIR=/app/dbt_project \
    PREFS_ENGINE=risingwave \
    PREFS_PROVISIONING=verify \
    DBT_SEND_ANONYMOUS_USAGE_STATS=false
USER 10001:10001
WORKDIR /var/lib/prefs
EXPOSE 4000
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s CMD ["dagster", "api", "grpc-health-check", "--port", "4000"]
# Other containers must reach it, so it cannot bind to loopback; the port takes no credentials, so only they may reach it.
# It exits if the definitions do not load; `dagster code-server` would keep running and report itself healthy.
CMD ["dagster", "api", "grpc", "--host", "0.0.0.0", "--port", "4000", "--module-name", "dagster_prefs.definitions"]
