"""The connection of a person to the API server, from the kubeconfig."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import yaml
from kubernetes.aio import client
from kubernetes.aio.config import ConfigException, load_kube_config

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.kube.connection import ApiConfiguration, bearer, client_context, in_cluster_configuration

# What the library raises for a file that is empty, not YAML, or has values of the wrong types.
_NOT_A_KUBECONFIG = (yaml.YAMLError, AttributeError, KeyError, RecursionError, TypeError)
# An exec plugin can fail with any of the first three.
_FAILURES = (ConfigException, OSError, ValueError, *_NOT_A_KUBECONFIG)
_HINT = "set KUBECONFIG, or check it with: kubectl config view --minify"


async def user_configuration(context: str | None = None) -> ApiConfiguration:
    """Return the configuration of a person: that of the kubeconfig, or in a pod without one that of the pod.

    Raises CertmountError APIServerUnavailable.
    """
    in_pod = bool(context is None and os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"))
    paths = os.environ.get("KUBECONFIG") or "~/.kube/config"
    found = client.Configuration()
    try:
        if not _any_exists(paths):
            raise FileNotFoundError(f"{paths} does not exist")
        loading = load_kube_config(context=context, client_configuration=found, persist_config=False)  # type: ignore[no-untyped-call]  # has no types
        await loading
        return _converted(found)
    except _FAILURES as error:
        if in_pod:
            return in_cluster_configuration()
        raise CertmountError(
            Reason.API_SERVER_UNAVAILABLE, Fault("kubeconfig", _problem(error, paths), _HINT)
        ) from None


def _any_exists(paths: str) -> bool:
    return any(Path(path).expanduser().exists() for path in paths.split(os.pathsep) if path)


def _problem(error: Exception, paths: str) -> str:
    """Return what is wrong, without content of the file: it can contain credentials."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{paths} is not valid YAML (line {error.problem_mark.line + 1})"
    if isinstance(error, _NOT_A_KUBECONFIG):
        return f"{paths} is not a kubeconfig file"
    return str(error)


def _converted(found: client.Configuration) -> ApiConfiguration:
    tls = client_context(found.ssl_ca_cert)
    if found.cert_file:
        tls.load_cert_chain(found.cert_file, keyfile=found.key_file)
    if not found.verify_ssl:
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    token = found.api_key.get("BearerToken", "").removeprefix("Bearer ")
    return ApiConfiguration(
        url=found.host, tls=tls, server_name=found.tls_server_name, proxy=found.proxy, authorization=bearer(token)
    )
