# The server alone: no Envoy, no simulated traffic. `docker build -t envoy-extproc .`
#
# PYTHON_IMAGE can be any image with Python 3.11 or newer and glibc; give one by digest for builds that can be repeated.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY envoy_extproc ./envoy_extproc
# Without pip of its own, the environment cannot install anything once it runs. No source is compiled: wheels alone.
RUN python -m pip wheel --disable-pip-version-check --no-cache-dir --no-deps --wheel-dir /src/dist . \
 && python -m venv --without-pip /opt/envoy-extproc \
 && python -m pip --python /opt/envoy-extproc/bin/python install --disable-pip-version-check --no-cache-dir \
      --only-binary :all: --constraint constraints.txt "$(echo /src/dist/*.whl)[kubernetes,tiktoken]"

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="envoy-extproc" \
      org.opencontainers.image.description="Envoy external-processing server for LLM inference: picks the model pod, accounts every stream" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /opt/envoy-extproc /opt/envoy-extproc
ENV PATH=/opt/envoy-extproc/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# A number, so that Kubernetes can tell that it is not root.
USER 10001:10001
# ext_proc, access log and health; metrics.
EXPOSE 9002 9090
# Kubernetes asks by probes of its own instead. A check is a Python process, so not often.
HEALTHCHECK --interval=30s --timeout=10s --start-period=20s \
  CMD ["envoy-extproc", "healthcheck", "--config", "/etc/envoy-extproc/config.yaml", "--service", "liveness"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["envoy-extproc"]
CMD ["serve", "--config", "/etc/envoy-extproc/config.yaml"]
