# docker build --build-arg JAX_EXTRA=cuda12 --tag qipo .      cuda12, cuda13, tpu; none for the CPU
FROM python:3.12-slim

ARG JAX_EXTRA=""
WORKDIR /source
COPY requirements.txt requirements.lock ./
RUN pip install --no-cache-dir --constraint=requirements.lock --requirement=requirements.txt \
    "jax[${JAX_EXTRA}]" "etils[epath-gcs]"
COPY . .
RUN pip install --no-cache-dir --constraint=requirements.lock ".[mujoco]" && useradd --create-home --uid=1000 qipo

USER 1000
WORKDIR /home/qipo
ENTRYPOINT ["efm-train"]
