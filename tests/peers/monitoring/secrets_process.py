"""``certmount secrets run`` with an API server at a URL: ``python -m tests.peers.monitoring.secrets_process URL OPTIONS``.

In a pod, the API server and its credentials are at fixed paths.
"""

from __future__ import annotations

import sys

from csi_driver.cli.main import main
from csi_driver.kube import connection

if __name__ == "__main__":
    url = sys.argv.pop(1)
    connection.in_cluster_configuration = lambda: connection.ApiConfiguration(url=url)
    sys.argv[1:1] = ["secrets", "run"]
    main()
