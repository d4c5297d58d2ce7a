# Two stages: the builder has pip and the lock files, the image has neither.
# Nothing here downloads a preset: the default one is a locked package like any other.

FROM python:3.11.15-slim-bookworm AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_NO_INPUT=1
WORKDIR /build

# The venv that is shipped. It gets no pip: the builder's own fills it from outside.
COPY requirements.lock ./
RUN python -m venv --without-pip /opt/venv \
    && python -m pip --python /opt/venv/bin/python install \
        --require-hashes --only-binary :all: -r requirements.lock

# The build backend goes into the builder only. Its version and hashes stand in the lock for
# development; cut out, they are a requirements file of one package. (As a constraint, `pip -c`, the
# same lines do not count as a pin, and --require-hashes refuses.)
COPY requirements-dev.lock ./
RUN sed -n '/^setuptools==/,/[^\\]$/p' requirements-dev.lock > setuptools.lock \
    && test -s setuptools.lock \
    && python -m pip install --require-hashes --only-binary :all: -r setuptools.lock

# This image has no C++ compiler, so the kernels get one out of a package, beside the venv: what is
# shipped must not have it.
COPY requirements-kernels.lock ./
RUN python -m pip install --target /opt/compiler \
        --require-hashes --only-binary :all: -r requirements-kernels.lock

# Alone, as it takes minutes and they change seldom. With the venv's Python, as the library belongs to
# its jaxlib. It lies in the package then, so the wheel has it.
COPY model/__init__.py model/
COPY model/kernels model/kernels
RUN PYTHONPATH=/opt/compiler /opt/venv/bin/python -m model.kernels.build --require

# Last, as it changes most often.
COPY pyproject.toml README.md LICENSE ./
COPY model model
COPY service service
RUN python -m pip wheel --no-deps --no-build-isolation --wheel-dir wheels . \
    && python -m pip --python /opt/venv/bin/python install --no-deps --no-index wheels/*.whl

FROM python:3.11.15-slim-bookworm

# The program's files belong to root, so the user it runs as cannot change them; /data is the one
# place it can. A named volume takes over owner and mode; a folder that is mounted over /data must
# belong to 65532 already.
RUN python -m pip uninstall --yes --root-user-action=ignore pip setuptools wheel \
    && install -d -m 0700 -o 65532 -g 65532 /data
COPY --from=builder /opt/venv /opt/venv

# HOME: this user has no entry in /etc/passwd, and Keras looks for a home folder.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONNOUSERSITE=1 \
    HOME=/data \
    GEMMA_DATA_DIR=/data/data \
    GEMMA_CACHE_DIR=/data/cache
USER 65532:65532
WORKDIR /data
VOLUME ["/data"]
EXPOSE 8000
STOPSIGNAL SIGTERM

# Alive, not ready: an orchestrator must not kill a service that is still loading.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["/opt/venv/bin/python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('GEMMA_PORT', '8000')), timeout=3); c.request('GET', '/health'); sys.exit(c.getresponse().status != 200)"]

# Options given to `docker run` take the place of CMD; variables (GEMMA_PRESET=...) leave it.
ENTRYPOINT ["gemma-service"]
CMD ["serve", "--host", "0.0.0.0"]
