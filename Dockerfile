# One image for both the node driver and the authority. Any base with Python 3.11 or newer and its venv module will do.
ARG BASE=docker.io/library/python:3.13-slim

FROM ${BASE} AS build
WORKDIR /src
# pip lies in an environment of its own and installs into the one that is shipped, which so never holds pip.
RUN python3 -m venv /tmp/pip && python3 -m venv --without-pip /opt/certmount
COPY requirements.lock requirements-build.lock ./
RUN /tmp/pip/bin/pip install --no-cache-dir --quiet --require-hashes -r requirements-build.lock \
 && /tmp/pip/bin/pip --python /opt/certmount/bin/python install --no-cache-dir --no-compile --quiet \
      --require-hashes --only-binary :all: -r requirements.lock
COPY pyproject.toml LICENSE ./
COPY csi_driver csi_driver
RUN /tmp/pip/bin/pip wheel --no-cache-dir --quiet --no-deps --no-build-isolation --wheel-dir /tmp/wheel . \
 && /tmp/pip/bin/pip --python /opt/certmount/bin/python install --no-cache-dir --no-compile --quiet --no-deps --no-index /tmp/wheel/*.whl

FROM ${BASE}
COPY --from=build /opt/certmount /opt/certmount
USER 65532:65532
ENTRYPOINT ["/opt/certmount/bin/certmount"]
