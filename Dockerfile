# dsmq in a container; README.md and deploy/README.md say how to run it.
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
WORKDIR /source
# What builds and what is installed are both locked, by hash. In an environment of its own, so that neither pip nor
# what builds gets into the image.
COPY deploy/docker/build-requirements.txt deploy/docker/requirements.txt ./
RUN python -m venv /build \
    && /build/bin/pip install --no-cache-dir --require-hashes --only-binary=:all: -r build-requirements.txt \
    && python -m venv --without-pip /opt/dsmq \
    && /build/bin/pip --python /opt/dsmq install --no-cache-dir --no-compile --require-hashes --only-binary=:all: \
        -r requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN /build/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /build/bin/pip --python /opt/dsmq install --no-cache-dir --no-compile --no-deps --no-index /wheels/*.whl
# Bytecode of all that runs, also of Python's library, which the base has without: where nothing can be written, each
# start and each health check would compile it again (0.7 against 0.2 s, 0.25 against 0.06 s; it takes 15 MB). By hash,
# because those by time depend on when an image was built; unchecked, because nothing changes in there.
ENV PYTHONPYCACHEPREFIX=/opt/dsmq/bytecode
RUN compile="/opt/dsmq/bin/python -m compileall -qf --invalidation-mode unchecked-hash" \
    && $compile -x '/(ensurepip|idlelib|lib2to3|pydoc_data|site-packages|test|tkinter|turtledemo|unittest)/' \
        "$(python -c 'import os; print(os.path.dirname(os.__file__))')" \
    && $compile /opt/dsmq/lib \
    && mkdir -p /state/lib && mkdir -m 1777 /state/lib/dsmq

FROM python:${PYTHON}-slim
LABEL org.opencontainers.image.title="dsmq" \
    org.opencontainers.image.description="A dead simple message queue: put in one process, get in another" \
    org.opencontainers.image.version="2.0.0" \
    org.opencontainers.image.licenses="MIT"
COPY --from=build /opt/dsmq /opt/dsmq
# All of it is commented out. It stands where a file of one's own is mounted, so that without one none is missing.
COPY dsmq.toml.example /etc/dsmq/dsmq.toml
# For whoever it runs as. What it holds outlives the container in a volume there.
COPY --from=build /state /var
VOLUME /var/lib/dsmq
ENV PATH=/opt/dsmq/bin:$PATH PYTHONPYCACHEPREFIX=/opt/dsmq/bytecode DSMQ_CONFIG=/etc/dsmq/dsmq.toml
# The container has an address of its own; whoever runs it decides which ports are published. Because it listens on that
# address, it does not start without a token (DSMQ_AUTH_TOKEN, DSMQ_AUTH_TOKEN_FILE), unless DSMQ_PROTECTED_MODE=false.
ENV DSMQ_HOST=0.0.0.0 DSMQ_HTTP_HOST=0.0.0.0 DSMQ_ALLOW_SHUTDOWN=false DSMQ_LOG_STREAM=stdout
ENV DSMQ_SNAPSHOT_FILE=/var/lib/dsmq/snapshot DSMQ_SNAPSHOT_INTERVAL_SECONDS=60
# A number: what checks that it is not root's knows no names.
USER 10001:10001
EXPOSE 30008 30009
STOPSIGNAL SIGTERM
# It finds the server as the server finds its settings: by DSMQ_* and the file.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s CMD ["dsmq", "ping"]
ENTRYPOINT ["dsmq"]
CMD ["serve"]
