# The feature server: profiles and rankings over HTTP.
# Build from the root of the project: docker build -f infra/docker/feature-server.Dockerfile -t prefs-server .
FROM python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d AS base

FROM base AS packages
COPY infra/locks/uv.txt /uv.txt
RUN pip install --no-cache-dir --require-hashes -r /uv.txt
COPY infra/docker/feature-server.lock /feature-server.lock
RUN python -m venv --without-pip /opt/venv \
    && uv pip sync --no-cache --compile-bytecode --require-hashes --python /opt/venv/bin/python /feature-server.lock

FROM base
RUN groupadd --gid 10001 prefs \
    && useradd --uid 10001 --gid prefs --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin prefs
COPY --from=packages /opt/venv /opt/venv
# The process must not be able to change its code, so that belongs to root; it writes no file.
COPY dagster_prefs /app/dagster_prefs
# The project's declarations; for a project of your own, its registry.json.
COPY dbt_project/registry.json /app/project/registry.json
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PREFS_PROJECT_DIR=/app/project \
    PREFS_ENGINE=risingwave
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=15s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/healthz', timeout=4)"]
# Other containers must reach it, so it cannot bind to loopback; so it does not start without tokens (docs/security.md).
# It accepts IP addresses as Host; names by which it is called must be given with --allowed-host.
CMD ["python", "-m", "dagster_prefs", "serve", "--host", "0.0.0.0"]
