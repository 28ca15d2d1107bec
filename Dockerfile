# One image for the node driver and the authority. Any base with Python 3.11 or newer and its venv module works.
# This is the only place that sets the Python version of the image; the end-to-end tests read it (tests/e2e/localkube/image.sh).
ARG BASE=docker.io/library/python:3.13-slim-trixie

FROM ${BASE} AS build
# A mirror of the Python package index. The lock files have the hashes of the packages.
ARG PIP_INDEX_URL
WORKDIR /src
# pip runs in a separate environment and installs into the one that the image contains, so the image contains no pip.
RUN python3 -m venv /tmp/pip && python3 -m venv --without-pip /opt/certmount
COPY requirements.lock requirements-build.lock ./
RUN /tmp/pip/bin/pip install --no-cache-dir --quiet --require-hashes -r requirements-build.lock \
 && /tmp/pip/bin/pip --python /opt/certmount/bin/python install --no-cache-dir --no-compile --quiet \
      --require-hashes --only-binary :all: -r requirements.lock \
 # Delete the synchronous half of the kubernetes client (23 MB): only kubernetes.aio is used, to read a kubeconfig.
 && rm -rf /opt/certmount/lib/python3*/site-packages/kubernetes/client/api \
 && find /opt/certmount/lib -type d -name tests -prune -exec rm -rf {} +
COPY pyproject.toml README.md LICENSE ./
COPY csi_driver csi_driver
RUN /tmp/pip/bin/pip wheel --no-cache-dir --quiet --no-deps --no-build-isolation --wheel-dir /tmp/wheel . \
 && /tmp/pip/bin/pip --python /opt/certmount/bin/python install --no-cache-dir --no-compile --quiet --no-deps --no-index /tmp/wheel/*.whl \
 # Compile here, because the root file system is read-only at run time. Python never compares this bytecode with its source.
 # The generated modules of kubernetes are not loaded.
 && cd /opt/certmount/lib/python3*/site-packages \
 && python3 -m compileall -q --invalidation-mode unchecked-hash -x 'kubernetes/(aio/)?client/(api|models)/' . \
 && /opt/certmount/bin/python -I -c 'import csi_driver.kube.admin.kubeconfig'

FROM ${BASE}
# Containers install nothing, so delete the pip of the base image too.
RUN rm -rf /usr/local/bin/pip* /usr/local/lib/python3*/site-packages/pip* /usr/local/lib/python3*/ensurepip /usr/lib/python3/dist-packages/pip* /usr/bin/pip*
COPY --from=build /opt/certmount /opt/certmount
ENV PATH=/opt/certmount/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
ENTRYPOINT ["/opt/certmount/bin/certmount"]
