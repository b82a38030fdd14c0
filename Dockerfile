# syntax=docker/dockerfile:1
# Two images, whose use docs/install.md describes:
#   docker build --target cpu -t sparsetune:cpu .
#   docker build --target cuda --build-arg TORCH_CUDA_ARCH_LIST=9.0 -t sparsetune:cuda .
# `--secret id=pip,src=FILE` has pip read FILE as its configuration; no layer keeps it.

FROM python:3.12.12-slim-trixie AS wheel
WORKDIR /source
COPY . .
RUN --mount=type=secret,id=pip,target=/etc/pip.conf pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# SpargeAttn's kernels, for one architecture: with 8.0, 8.6 or 8.7 among several it leaves out its faster ones for all.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS kernels
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3-dev python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /venv
ENV PATH=/venv/bin:$PATH
COPY constraints.txt /
# The PyTorch of the image below: its CUDA must be of the version that compiles here.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --no-cache-dir -c /constraints.txt torch ninja numpy packaging setuptools wheel
ADD https://github.com/thu-ml/SpargeAttn.git#bfd980b781784c04ad6a53e7ee657c0645d99171 /SpargeAttn
WORKDIR /SpargeAttn
ARG TORCH_CUDA_ARCH_LIST=9.0
ARG MAX_JOBS
# The flag defines <cassert> twice under CUDA 13 (SpargeAttn's issues 115 and 122).
RUN sed -i 's/"-Xcompiler", "-include,cassert",//' setup.py && \
    pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM python:3.12.12-slim-trixie AS cpu
COPY constraints.txt /
# PyTorch first, in a layer that changes of the source leave as it is.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf pip install --no-cache-dir -c /constraints.txt torch
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /constraints.txt "$(echo /wheels/*.whl)[report,ui]"
# Runs, results and caches go to the folder that is mounted at /work; `--user` may name any user.
ENV HOME=/work USER=sparsetune
RUN useradd --home-dir /work --create-home --uid 1000 sparsetune
USER 1000
WORKDIR /work
ENTRYPOINT ["sparsetune"]
CMD ["--help"]

FROM cpu AS cuda
USER 0
# Triton compiles the launchers of its kernels with the system's compiler.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN --mount=from=kernels,source=/wheels,target=/wheels pip install --no-cache-dir --no-deps /wheels/*.whl
USER 1000
