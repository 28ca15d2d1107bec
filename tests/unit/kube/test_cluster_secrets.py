"""Issuer credentials from Secrets."""

from __future__ import annotations

import base64
import json

import pytest

from csi_driver.authority import cluster_environment
from csi_driver.authority.issuers.dependencies import CredentialReader
from csi_driver.cli import issuer
from csi_driver.core.config.issuers import SecretSource
from csi_driver.core.errors import CertmountError
from csi_driver.kube.connection import ApiConfiguration
from tests.unit.kube.api_server import FakeApiServer

JWK = SecretSource("certmount", "step-provisioner", "jwk")


@pytest.fixture
def in_a_cluster(server: FakeApiServer, monkeypatch: pytest.MonkeyPatch) -> FakeApiServer:
    monkeypatch.setattr(cluster_environment, "in_cluster_configuration", lambda: ApiConfiguration(url=server.url))
    return server


async def test_issuer_check_reads_the_same_secrets_as_the_authority(
    in_a_cluster: FakeApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = ApiConfiguration(url=in_a_cluster.url)
    monkeypatch.setattr("csi_driver.kube.connection.in_cluster_configuration", lambda: configuration)
    put_secret(in_a_cluster, jwk=b"the key")
    async with issuer._dependencies(in_cluster=True) as dependencies:
        assert (await dependencies.credentials.read(JWK)).reveal() == b"the key"
        assert dependencies.secret_store is not None
        stored = await dependencies.secret_store("certmount", "step-provisioner").load()
        assert stored.values["jwk"].reveal() == b"the key"
    async with issuer._dependencies(in_cluster=False) as dependencies:
        assert dependencies.secret_store is None


def put_secret(server: FakeApiServer, **values: bytes) -> None:
    data = {name: base64.b64encode(value).decode() for name, value in values.items()}
    metadata = {"name": "step-provisioner", "namespace": "certmount", "resourceVersion": "1"}
    server.objects["secrets/step-provisioner"] = {"kind": "Secret", "metadata": metadata, "data": data}


async def read(source: SecretSource = JWK) -> bytes:
    async with cluster_environment.cluster_secrets() as read_secret:
        return (await CredentialReader(read_secret).read(source)).reveal()


async def test_reader_gets_one_secret_by_name(in_a_cluster: FakeApiServer) -> None:
    put_secret(in_a_cluster, jwk=b"the key", password=b"other")
    assert await read() == b"the key"
    requests = [(verb, path) for verb, path, _ in in_a_cluster.requests]
    assert requests == [("GET", "/api/v1/namespaces/certmount/secrets/step-provisioner")]


async def test_name_of_the_only_key_does_not_matter_for_tsig_keys(in_a_cluster: FakeApiServer) -> None:
    tsig = SecretSource("certmount", "step-provisioner", "tsig", only=True)
    put_secret(in_a_cluster, anything=b"name:key")
    assert await read(tsig) == b"name:key"
    put_secret(in_a_cluster, anything=b"other", tsig=b"name:key")
    assert await read(tsig) == b"name:key"
    put_secret(in_a_cluster, one=b"hunter2", two=b"x")
    text = "^IssuerUnavailable: Secret certmount/step-provisioner: has no key tsig; it has one, two$"
    with pytest.raises(CertmountError, match=text):
        await read(tsig)


async def test_missing_secret_key_or_permission_is_named(in_a_cluster: FakeApiServer) -> None:
    with pytest.raises(CertmountError, match=r'^IssuerUnavailable: .*secrets "step-provisioner" not found'):
        await read()
    put_secret(in_a_cluster, password=b"hunter2", other=b"x")
    with pytest.raises(CertmountError, match="has no key jwk; it has other, password") as without:
        await read()
    assert "hunter2" not in str(without.value)
    put_secret(in_a_cluster, jwk=b"")
    with pytest.raises(CertmountError, match="key jwk of Secret certmount/step-provisioner: is empty"):
        await read()
    message = 'secrets "step-provisioner" is forbidden: User "system:serviceaccount:certmount:authority" cannot get'
    in_a_cluster.fail = (403, json.dumps({"message": message}).encode())
    with pytest.raises(CertmountError, match="is forbidden: User"):
        await read()
