# drpo on a CPU, from the root of a checkout:
#   docker build --file docker/cpu.Dockerfile --tag drpo .
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/work" --volume drpo-cache:/cache drpo train demo
FROM python:3.11-slim AS build
# pycosat, which reasoning-gym needs, is built from source.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/drpo
ENV PATH=/opt/drpo/bin:$PATH
WORKDIR /source
COPY constraints.txt ./
# On x86-64 pip's default is a build for CUDA, which works on a CPU too and is gigabytes larger: name PyTorch's index of CPU builds.
ARG TORCH_INDEX=""
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' constraints.txt)"
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt '.[train,gym]'

FROM python:3.11-slim
COPY --from=build /opt/drpo /opt/drpo
# Models go into /cache; runs into /work, the folder that is mounted. Both are open to whichever user the container runs as.
RUN mkdir --mode=1777 /cache && mkdir --mode=1777 /work
ENV PATH=/opt/drpo/bin:$PATH HOME=/cache DRPO_CACHE=/cache/drpo HF_HOME=/cache/huggingface
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["drpo"]
CMD ["--help"]
