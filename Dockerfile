# One image for both the node driver and the authority. Any base with Python 3.11 or newer and its venv module will do.
ARG BASE=docker.io/library/python:3.13-slim

FROM ${BASE} AS build
WORKDIR /src
# pip lies in an environment of its own and installs into the one that is shipped, which so never holds pip.
RUN python3 -m venv /tmp/pip && python3 -m venv --without-pip /opt/certmount
COPY requirements.lock requirements-build.lock ./
RUN /tmp/pip/bin/pip install --no-cache-dir --quiet --require-hashes -r requirements-build.lock \
 && /tmp/pip/bin/pip --python /opt/certmount/bin/python install --no-cache-dir --no-compile --quiet \
      --require-hashes --only-binary :all: -r requirements.lock \
 # The blocking half of the kubernetes client (23 MB) is never loaded: the authority uses kubernetes.aio.
 && rm -rf /opt/certmount/lib/python3*/site-packages/kubernetes/client/api \
 && find /opt/certmount/lib -type d -name tests -prune -exec rm -rf {} +
COPY pyproject.toml README.md LICENSE ./
COPY csi_driver csi_driver
RUN /tmp/pip/bin/pip wheel --no-cache-dir --quiet --no-deps --no-build-isolation --wheel-dir /tmp/wheel . \
 && /tmp/pip/bin/pip --python /opt/certmount/bin/python install --no-cache-dir --no-compile --quiet --no-deps --no-index /tmp/wheel/*.whl \
 # Bytecode is made here, as the root file system is read-only later; it is never compared with its source again.
 # Of kubernetes' 1,700 generated modules only the two big ones that the authority loads are worth it.
 && cd /opt/certmount/lib/python3*/site-packages \
 && python3 -m compileall -q --invalidation-mode unchecked-hash -x 'kubernetes/(aio/)?client/(api|models)/' . \
 && python3 -m compileall -q --invalidation-mode unchecked-hash kubernetes/aio/client/api/core_v1_api.py kubernetes/aio/client/api/authentication_v1_api.py \
 && /opt/certmount/bin/python -I -c 'import csi_driver.kube; from kubernetes.aio import client; client.CoreV1Api, client.AuthenticationV1Api'

FROM ${BASE}
# Nothing is installed in a container, so the base's own pip goes too.
RUN rm -rf /usr/local/bin/pip* /usr/local/lib/python3*/site-packages/pip* /usr/local/lib/python3*/ensurepip /usr/lib/python3/dist-packages/pip* /usr/bin/pip*
COPY --from=build /opt/certmount /opt/certmount
ENV PATH=/opt/certmount/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
ENTRYPOINT ["/opt/certmount/bin/certmount"]
