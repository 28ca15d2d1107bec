"""Files that are not a kubeconfig have an error that names the file and quotes nothing of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from kubernetes.aio.config import kube_config

from csi_driver.core.errors import CertmountError
from csi_driver.kube.admin.kubeconfig import user_configuration


@pytest.mark.parametrize(
    "content, problem",
    [
        (None, "does not exist"),
        ("", "is not a kubeconfig file"),
        ("secret", "is not a kubeconfig file"),
        ("users: [", "is not valid YAML (line 1)"),
        ("secret: [\n]: secret", "is not valid YAML (line 2)"),
        ("[" * 5000, "is not a kubeconfig file"),
    ],
    ids=["missing", "empty", "text", "unfinished", "not YAML", "deep"],
)
async def test_file_that_is_no_kubeconfig(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None, problem: str
) -> None:
    file = tmp_path / "config"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("KUBECONFIG", str(file))
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(file))  # the library reads the variable once
    with pytest.raises(CertmountError) as error:
        await user_configuration()
    hint = "set KUBECONFIG, or check it with: kubectl config view --minify"
    assert str(error.value) == f"APIServerUnavailable: kubeconfig: {file} {problem}; {hint}"
