# syntax=docker/dockerfile:1
# An image in which the main job runs, as a user who is not root, on CPU builds of PyTorch:
#
#     docker build -t ssmrl . && docker run --rm ssmrl
#     mkdir -p output
#     docker run --rm --user "$(id -u):$(id -g)" -e HOME=/tmp -v "$PWD/output:/app/output" ssmrl   # and keep what it makes
#     docker run --rm ssmrl python examples/adapt_dynamics.py --env Pendulum-v1
#     docker build --target tests -t ssmrl-tests . && docker run --rm ssmrl-tests
ARG PYTHON=3.11

# What needs a compiler: the wheel, with the loops over time in C++.
FROM python:${PYTHON}-slim AS wheel
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt build
COPY pyproject.toml hatch_build.py README.md LICENSE CHANGELOG.md CITATION.cff ./
COPY ssmrl ssmrl
RUN python -m build --wheel --outdir dist .

# The library and what its examples and benchmarks need; no compiler, no source of it.
FROM python:${PYTHON}-slim AS runtime
ARG INSTALL="uv pip install --system --no-cache --torch-backend=cpu"
ENV MPLBACKEND=Agg PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /app
COPY constraints.txt ./
# PyTorch first: it is most of the image, and does not change when the library does.
RUN pip install --no-cache-dir -c constraints.txt uv && ${INSTALL} -c constraints.txt torch
COPY --from=wheel /source/dist dist
RUN ${INSTALL} -c constraints.txt "ssmrl[examples,mujoco] @ file://${PWD}/$(echo dist/*.whl)" && rm -r dist
COPY examples examples
COPY benchmarks benchmarks
RUN useradd --uid 1000 --create-home ssmrl && mkdir output && chown 1000 output
USER 1000
CMD ["python", "examples/adapt_dynamics.py", "--env", "CartPole-v1"]

# The same with a compiler, which compile=True needs, the peers of the benchmarks, and the tests.
FROM runtime AS tests
USER 0
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
COPY . .
RUN ${INSTALL} -c constraints.txt ".[dev]" && chown -R 1000 .
USER 1000
CMD ["pytest", "-n", "auto"]

# What `docker build` makes when it is not told which.
FROM runtime
