# CUDA by default: `docker build .`; for the CPU: `docker build --build-arg TORCH=cpu .`
# No weights are baked in but the embedded demo's: a model comes from the hub cache or a mounted folder.
# The base needs nothing of CUDA: PyTorch's wheels bring its libraries, NVIDIA's container toolkit the driver's.
ARG BASE=ubuntu:24.04

FROM ${BASE} AS build
# Which of PyTorch's builds: cu130 (drivers from 580 on), cu126 (older ones) or cpu. PyTorch 2.12 was the first without
# cu128. TORCH_INDEX: an index that has it, beside PyPI.
ARG TORCH=cu130
ARG TORCH_INDEX=https://download.pytorch.org/whl/${TORCH}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/matsteer
WORKDIR /build
COPY constraints.txt ./
RUN /opt/matsteer/bin/pip install --no-cache-dir --extra-index-url "${TORCH_INDEX}" \
    "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY server ./server
COPY steering ./steering
COPY steer_ops ./steer_ops
COPY training ./training
COPY demo ./demo
COPY checkpoints/demo ./checkpoints/demo
COPY checkpoints/tone ./checkpoints/tone
RUN /opt/matsteer/bin/pip install --no-cache-dir --constraint constraints.txt '.[otel]'

FROM ${BASE}
LABEL org.opencontainers.image.title="mat-steer" \
      org.opencontainers.image.description="An inference server for steered text generation" \
      org.opencontainers.image.licenses="Apache-2.0"
# libgomp1: the OpenMP of PyTorch's CPU kernels. g++: the kernels that are compiled for the CPU at the start; gcc and the
# headers: those that Triton compiles for the GPU.
ARG TORCH=cu130
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 libgomp1 \
    && if [ "${TORCH}" = cpu ]; then apt-get install --yes --no-install-recommends g++; \
       else apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev; fi \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 matsteer \
    && install --directory --owner 10001 /app /home/matsteer/.cache /home/matsteer/.cache/huggingface
COPY --from=build /opt/matsteer /opt/matsteer
WORKDIR /app
COPY --chown=10001 checkpoints ./checkpoints
USER 10001
ENV PATH=/opt/matsteer/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HF_HOME=/home/matsteer/.cache/huggingface \
    TRITON_CACHE_DIR=/home/matsteer/.cache/triton \
    MATSTEER_HOST=0.0.0.0 \
    MATSTEER_PORT=8000
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["/opt/matsteer/bin/python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['MATSTEER_PORT'] + '/readyz', timeout=4)"]
ENTRYPOINT ["matsteer"]
CMD ["serve"]
