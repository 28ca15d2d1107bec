"""The keys of Secrets."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

from csi_driver.core.certificates.keys import key_type_of
from csi_driver.core.names import DNSName
from csi_driver.core.spec import KeyType
from csi_driver.secrets.issuance import SecretIssuance
from csi_driver.secrets.requests import CertificateOptions, DesiredSecret, SecretName
from tests.support.scripted_secrets import ScriptedSecretsAuthority


def desired(key_type: KeyType | None) -> DesiredSecret:
    options = CertificateOptions("internal", key_type)
    return DesiredSecret(SecretName("shop", "tls"), (DNSName.parse("shop.example.com"),), options, ())


async def test_cheap_keys_do_not_wait_for_expensive_keys_of_other_tenants() -> None:
    busy = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        issuance = SecretIssuance(ScriptedSecretsAuthority(), executor)
        executor.submit(busy.wait)
        try:
            async with asyncio.timeout(5.0):
                prepared = [await issuance.prepare(desired(one), None) for one in (None, KeyType.ED25519)]
            expensive = asyncio.ensure_future(issuance.prepare(desired(KeyType.RSA_2048), None))
            await asyncio.sleep(0.05)
            assert not expensive.done(), "it would block the event loop"
        finally:
            busy.set()
        prepared.append(await expensive)
    found = [key_type_of(one.key.public_key()) for one in prepared]
    assert found == [KeyType.EC_P256, KeyType.ED25519, KeyType.RSA_2048]
