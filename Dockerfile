# One image for all services: the dispatcher refuses workers that have other code.
FROM ghcr.io/astral-sh/uv:0.9.9 AS uv

FROM python:3.11-slim-bookworm AS build
COPY --from=uv /uv /usr/local/bin/uv
# Which torch: empty takes the package index's own (with CUDA), `cpu` a smaller one without.
ARG TORCH_BACKEND=
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy VIRTUAL_ENV=/opt/uncanny
WORKDIR /source
COPY pyproject.toml ./
RUN uv venv /opt/uncanny && uv pip install --no-cache ${TORCH_BACKEND:+--torch-backend=$TORCH_BACKEND} --extra service --extra s3 -r pyproject.toml
COPY README.md LICENSE ./
COPY service service
COPY workers workers
COPY api api
RUN uv pip install --no-cache --no-deps .

FROM python:3.11-slim-bookworm
# torch.compile calls g++ on the worker. Any version does, and Debian drops old ones.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 uncanny \
    && useradd --uid 10001 --gid uncanny --create-home uncanny \
    && install -d -o uncanny -g uncanny /artifacts /data /home/uncanny/spool
COPY --from=build /opt/uncanny /opt/uncanny
ENV PATH=/opt/uncanny/bin:$PATH PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /home/uncanny
EXPOSE 8765
CMD ["uncanny", "api"]
