"""Measures certificates for many nodes: the load generator has one stream for each node."""

from __future__ import annotations

from pathlib import Path

from tests.bench.authority_input import make_pods, write_certmount
from tests.bench.authority_peers import Load, certmount
from tests.bench.go_programs import build_go_program
from tests.bench.growth.series import growth
from tests.bench.table import Figure
from tests.support.tokens import TokenIssuer

_NODES = (4, 16, 64, 160)
"""With one request each: the authority limits the requests of one node, and the number of all requests in progress."""
_WARM_UP = 500


async def measure_issuing(directory: Path) -> list[Figure]:
    """Measure the CPU time of a certificate by the number of nodes. Needs Go."""
    program = await build_go_program("loadgen")
    if program is None:
        print("growth: certificates skipped; needs Go for the load generator")
        return []
    pods, issuer, costs, rates = make_pods(), TokenIssuer(), {}, []
    async with certmount(directory / "issuing", issuer) as authority:
        for count in _NODES:
            file = directory / f"requests-of-{count}"
            write_certmount(file, pods, issuer, range(count))
            result = await authority.load(program, "stream", file, Load(count), _WARM_UP)
            costs[count] = result.server_us
            rates.append(f"{count}: {result.a_second:.0f}/s")
    method = f"CPU time of the authority; each node has one request in progress; {', '.join(rates)}"
    return [growth("certificates, by nodes", costs, "us", method)]
