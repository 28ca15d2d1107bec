"""Measures the building blocks of a publish one by one, in this process."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from statistics import median

from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.certificates.keys import generate_key
from csi_driver.core.certificates.verification import ExpectedCertificate, VerifiedCertificate, verify_certificate
from csi_driver.core.formats.file_format import VolumeContents
from csi_driver.core.formats.layout import FileLayout
from csi_driver.core.names import DNSName, Names, spiffe_id
from csi_driver.core.spec import KeyType
from csi_driver.host.generations import VolumeFile, write_generation
from csi_driver.host.mounts import KernelMounts
from tests.bench.table import Figure
from tests.bench.world import MOUNTS
from tests.support.scripted_authority import TRUST_DOMAIN, TestCA

_ROUNDS = 9


def measure_blocks(directory: Path) -> list[Figure]:
    """Measure each block; mounts only if the process can mount."""
    ca, names = TestCA(), Names.of([DNSName.parse("shop.web.svc.cluster.local")])
    key = generate_key(KeyType.EC_P256)
    signed = Names.of(names.dns, [spiffe_id(TRUST_DOMAIN, "web", "shop")])
    leaf = ca.sign(key.public_key(), signed, timedelta(hours=1)).public_bytes(Encoding.DER)
    expected = ExpectedCertificate(key.public_key(), names, "web", "shop")

    def check() -> VerifiedCertificate:
        return verify_certificate([leaf], [ca.der], expected, datetime.now(UTC))

    verified = check()
    contents = VolumeContents(key, verified.chain, verified.roots)
    blocks = [
        ("key EC-P256", _us(lambda: generate_key(KeyType.EC_P256), 100), "13 us"),
        ("key RSA-2048", _us(lambda: generate_key(KeyType.RSA_2048), 3), "49 ms"),
        ("key RSA-3072", _us(lambda: generate_key(KeyType.RSA_3072), 1), "-"),
        ("request (CSR)", _us(lambda: build_csr(key, names), 50), "-"),
        ("check of the answer", _us(check, 50), "-"),
        ("files rendered", _us(lambda: FileLayout().render(contents), 50), "-"),
    ]
    if MOUNTS == "kernel":
        mounts, tmpfs, target = KernelMounts(), directory / "tmpfs", directory / "target"
        files = [VolumeFile(file.name, file.content, 0o440, 1000) for file in FileLayout().render(contents)]
        stamps = count()
        tmpfs.mkdir()
        target.mkdir()
        mounts.make_tmpfs(tmpfs, 1 << 20, 128)
        try:
            written = _us(lambda: write_generation(tmpfs, files, f"2026_{next(stamps)}"), 50)
            blocks.append(("generation written (tmpfs)", written, "-"))
        finally:
            mounts.unmount(tmpfs)

        def cycle() -> None:
            mounts.make_tmpfs(tmpfs, 1 << 20, 128)
            mounts.bind_read_only(tmpfs, target)
            mounts.unmount(target)
            mounts.unmount(tmpfs)

        blocks.append(("tmpfs + bind + unmount", _us(cycle, 50), "247 us"))
    return [Figure(f"building block: {name}", _text(us), reference=reference) for name, us, reference in blocks]


def _us(call: Callable[[], object], calls: int) -> float:
    """Return the median over rounds of the mean duration of a call."""
    call()
    return median(timeit.repeat(call, number=calls, repeat=_ROUNDS)) / calls * 1e6


def _text(microseconds: float) -> str:
    return f"{microseconds:.0f} us" if microseconds < 10_000 else f"{microseconds / 1000:.0f} ms"
