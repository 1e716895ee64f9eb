# Build: docker build -t cacheservice .
# Run:   docker run --read-only --tmpfs /tmp -p 127.0.0.1:8000:8000 \
#            -e CACHESERVICE_POSTGRES__DSN_FILE=/run/secrets/dsn -v ./secrets:/run/secrets:ro \
#            -v ./config:/etc/cacheservice:ro cacheservice
# Mount folders, not single files: if an editor or a tool replaces a mounted file, the container keeps the old content.

FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY cacheservice cacheservice
COPY migrations migrations
COPY tac tac
# All dependencies have wheels: this stage needs no compiler, and the final image has none.
RUN python -m venv /opt/cacheservice \
 && /opt/cacheservice/bin/pip install --no-cache-dir . \
 && /opt/cacheservice/bin/python -m compileall -q /opt/cacheservice

FROM python:3.11-slim
# The folder is for persistence.directory: a volume that is mounted there inherits its owner and mode.
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin cacheservice \
 && install --directory --owner=10001 --mode=700 /var/lib/cacheservice
COPY --from=build /opt/cacheservice /opt/cacheservice
COPY tac /opt/cacheservice/tac
ENV PATH=/opt/cacheservice/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    CACHESERVICE_CONFIG=/etc/cacheservice/cacheservice.toml \
    CACHESERVICE_STATUS__HOST=:: \
    CACHESERVICE_HTTP__HOST=::
USER 10001
WORKDIR /tmp
EXPOSE 8000 6380 8080
STOPSIGNAL SIGTERM
# Only liveness, at the configured port: a database that is down must not cause a restart of its cache.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s CMD ["cacheservice", "health", "--timeout", "2"]
# As PID 1: SIGTERM stops it cleanly, exit code 0.
CMD ["twistd", "-noy", "/opt/cacheservice/tac/cacheservice.tac", "--pidfile="]
