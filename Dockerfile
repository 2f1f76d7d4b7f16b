# The package with all it needs, for CPUs or for NVIDIA GPUs; harness-train is what it runs, as a user without rights.
#
#   docker build -t potential-harness:0.1.0-cpu --build-arg TORCH_INDEX=... .
#   docker build -t potential-harness:0.1.0-cuda --build-arg VARIANT=cuda .
#   docker run --rm potential-harness:0.1.0-cpu trainer=debug logger=none
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/workspace" potential-harness:0.1.0-cuda experiment=alloy
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/workspace" --entrypoint torchrun potential-harness:0.1.0-cuda \
#     --standalone --nproc-per-node gpu -m harness.train experiment=alloy
#
# TORCH_INDEX is an index of packages beside PyPI, such as that of torch for CPUs, of which PyPI has none for x86-64: without
# it the cpu variant works too, but carries the CUDA libraries along, some 5 GB. Give no address with a password in it.
# The cuda variant has those libraries from PyPI; of the host it needs NVIDIA's driver and container toolkit. DeepSpeed,
# which compiles operations with nvcc and g++, is not in it.
ARG VARIANT=cpu
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

# --- the wheel ---

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /source
COPY constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt hatchling
COPY pyproject.toml README.md LICENSE ./
COPY conf/ conf/
COPY harness/ harness/
COPY hydra_plugins/ hydra_plugins/
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

# --- what is installed ---

FROM ${PYTHON_IMAGE} AS environment
ARG TORCH_INDEX=""
RUN python -m venv /opt/harness
COPY constraints-image.txt /tmp/constraints.txt
COPY --from=wheel /wheels/ /tmp/wheels/
RUN /opt/harness/bin/pip install --no-cache-dir --constraint /tmp/constraints.txt \
      ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} /tmp/wheels/*.whl

# --- what is run ---

FROM ${PYTHON_IMAGE} AS runtime
RUN groupadd --gid 1000 harness \
 && useradd --uid 1000 --gid harness --create-home harness \
 && install --directory --owner harness --group harness /workspace
COPY --from=environment /opt/harness /opt/harness
# what is written beside outputs goes to /tmp, so that it works for other users too
ENV PATH=/opt/harness/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HARNESS_CACHE=/tmp/harness \
    MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /workspace
USER 1000:1000

FROM runtime AS runtime-cpu

FROM runtime AS runtime-cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# one of the two above, which have no tag
# hadolint ignore=DL3006
FROM runtime-${VARIANT}
# an image that cannot train is not made: a few steps and a test, on a CPU
RUN harness-train trainer=debug trainer.accelerator=cpu logger=none hydra.run.dir=/tmp/smoke \
 && rm -rf /tmp/smoke /tmp/harness /tmp/matplotlib
ENTRYPOINT ["harness-train"]
