# One image for the SuperLink and the clients. For the CPU by default:
#
#   make image                                  docker build or podman build, with the arguments below from the variables
#   docker build -t copra-fl .                  BASE_IMAGE, TORCH_INDEX and IMAGE
#
# Every package has the release in constraints.txt, the build backend too. A base image with its digest makes builds at
# different times equal: BASE_IMAGE=docker.io/library/python:3.11-slim@sha256:... (`docker buildx imagetools inspect`
# prints the digest of a tag; in a deployment's .env the variable is COPRA_FL_BASE_IMAGE).
#
# For NVIDIA GPUs, with PyPI's own build of torch (docker-compose.gpu.yml does this):
#
#   docker build -t copra-fl:gpu --build-arg TORCH_INDEX=https://pypi.org/simple .
#
# No key, certificate or data is copied in: they are mounted when a container starts. Health checks: docker-compose.yml.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim

FROM ${BASE_IMAGE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /source
RUN python -m venv /opt/copra-fl
ENV PATH=/opt/copra-fl/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# The releases that the tests passed with; older pips read one variable for the build backend, newer ones the other.
ENV PIP_CONSTRAINT=/source/constraints.txt PIP_BUILD_CONSTRAINT=/source/constraints.txt
# What changes seldom first: torch, the other dependencies, and only then the sources. Torch's own dependencies come
# with the others: an index of torch alone need not have the releases that constraints.txt names.
COPY constraints.txt .
RUN pip install --quiet --no-deps --index-url "${TORCH_INDEX}" "torch>=2.11"
COPY pyproject.toml .
RUN python -c "import tomllib; print('\n'.join(tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']))" \
        > requirements.txt \
    && pip install --quiet --requirement requirements.txt
COPY . .
RUN pip install --quiet --no-deps .

FROM ${BASE_IMAGE}
RUN useradd --uid 10001 --no-create-home copra
COPY --from=build /opt/copra-fl /opt/copra-fl
# Everything that a container writes lies below /state, which a volume outlives it on. HF_HOME: models from the hub.
ENV PATH=/opt/copra-fl/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/state \
    COPRA_FL_CACHE=/state/cache \
    HF_HOME=/state/huggingface \
    FLWR_HOME=/state/flower \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 \
    TOKENIZERS_PARALLELISM=false
# The Flower app that is submitted, which the package carries.
RUN ln -s "$(python -I -c 'import copra_fl; print(copra_fl.__path__[0])')/_app" /app
USER 10001
WORKDIR /state
