# dsmq in a container:
# docker build -t dsmq . && docker run --rm -p 127.0.0.1:30008:30008 -e DSMQ_AUTH_TOKEN=... dsmq
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
COPY pyproject.toml README.md LICENSE /source/
COPY src /source/src
RUN python -m venv /opt/dsmq && /opt/dsmq/bin/pip install --no-cache-dir /source

FROM python:${PYTHON}-slim
COPY --from=build /opt/dsmq /opt/dsmq
ENV PATH=/opt/dsmq/bin:$PATH
# A container has an address of its own; which of its ports are reachable is for who runs it to say.
# Without a token it refuses them all: see protected_mode.
ENV DSMQ_HOST=0.0.0.0 DSMQ_METRICS_HOST=0.0.0.0 DSMQ_REMOTE_SHUTDOWN=false
USER 10001:10001
EXPOSE 30008 30009
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s CMD ["dsmq", "ping"]
ENTRYPOINT ["dsmq"]
CMD ["serve"]
