# drpo on NVIDIA's GPUs, from the root of a checkout; the machine needs NVIDIA's driver and its container toolkit:
#   docker build --file docker/cuda.Dockerfile --tag drpo:cuda .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" --volume "$PWD:/work" --volume drpo-cache:/cache drpo:cuda train demo
# PyTorch's wheels bring the CUDA libraries with them, so a plain Python image is enough.
FROM python:3.11-slim
# A C compiler for pycosat, which reasoning-gym needs, and at run time for Triton, which builds its launchers.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/drpo
ENV PATH=/opt/drpo/bin:$PATH
WORKDIR /source
COPY constraints.txt ./
# Another build of PyTorch, where the driver is older than the default asks for: name the index that has it.
ARG TORCH_INDEX=""
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' constraints.txt)"
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt '.[train,gym]' && rm -rf /source
RUN mkdir --mode=1777 /cache && mkdir --mode=1777 /work
ENV HOME=/cache DRPO_CACHE=/cache/drpo HF_HOME=/cache/huggingface TRITON_CACHE_DIR=/cache/triton
# What the container toolkit gives the container where --gpus is not said.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["drpo"]
CMD ["--help"]
