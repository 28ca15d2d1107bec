"""Publish a volume: NodePublishVolume from the call to the mounted files.

The steps are: wait for the turn of the pod's namespace, parse the call, lock the volume, republish it if it has files, parse
its attributes and target path, admit it to the memory budget, mount its tmpfs and meanwhile obtain a certificate unless it
has only roots, choose its roots, render and write its files, bind them, schedule the renewal, and write newer roots.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog

from csi_driver._proto import csi_pb2
from csi_driver.core.certificates.root_sets import merge_roots
from csi_driver.core.errors import CertmountError
from csi_driver.core.formats.file_format import VolumeContents
from csi_driver.core.spec import KeyType
from csi_driver.host.target_paths import check_target
from csi_driver.host.volume_store import VolumeStore
from csi_driver.node.fair_thread import FairThread
from csi_driver.node.issuance.certificate_client import CertificateClient
from csi_driver.node.issuance.certificate_request import CertificateRequest
from csi_driver.node.log_shares import PodLogShares
from csi_driver.node.publishing.publish_request import (
    Declaration,
    PublishRequest,
    parse_declaration,
    parse_password,
    parse_publish,
    with_key_type,
)
from csi_driver.node.publishing.publish_turns import PublishTurns
from csi_driver.node.publishing.published_volumes import PublishedVolumes
from csi_driver.node.publishing.restore import VolumeRestorer, new_record
from csi_driver.node.renewal.reloads import ReloadRules
from csi_driver.node.renewal.renewals import Renewals
from csi_driver.node.threads import in_thread, to_the_end
from csi_driver.node.trust.root_distribution import RootDistribution
from csi_driver.node.volumes.budget import VolumeBudget
from csi_driver.node.volumes.volume import Volume, VolumeTable
from csi_driver.node.volumes.volume_files import RenderedVolume, VolumeFiles, parse_roots, store_password

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Publisher:
    """Publishes the volumes of the node."""

    kubelet_dir: Path
    node_name: str
    store: VolumeStore
    volumes: VolumeTable
    published: PublishedVolumes
    restorer: VolumeRestorer
    certificates: CertificateClient
    roots: RootDistribution
    renewals: Renewals
    budget: VolumeBudget
    reload_rules: ReloadRules
    default_key_type: KeyType
    logs: PodLogShares
    turns: PublishTurns = field(default_factory=PublishTurns)
    mounter: FairThread = field(default_factory=lambda: FairThread("mounts"))

    async def publish(self, call: csi_pb2.NodePublishVolumeRequest) -> None:
        """Mount the files of a volume at its target path, or update a volume that is already published.

        Kubelets before 1.37 (kubernetes#121271) remove the mount of a running pod if a republish fails. Therefore this
        call never fails for a volume whose files are mounted.

        Raises CertmountError: why the first publish failed. Nothing of the volume remains.
        """
        try:
            async with self.turns.turn(call):
                request = parse_publish(call, self.kubelet_dir, self.node_name)
                request = with_key_type(request, self.default_key_type)
                async with self.volumes.lock(request.volume_id):
                    if volume := await self._find_existing(request):
                        await self._republish(volume, request)
                        await self._update_password(volume, request)
                    else:
                        await self._publish_first(request)
        except CertmountError as error:
            if not self.published.is_mounted(call.volume_id, call.target_path):
                raise
            if self.logs.may_log():
                log.warning("republish failed; the volume keeps its files", reason=error.reason.word, error=str(error))

    async def _find_existing(self, request: PublishRequest) -> Volume | None:
        """Return the volume if it has files; adopt a mounted volume whose record was lost."""
        volume = self.volumes.get(request.volume_id)
        if volume is None and self.published.is_mounted(request.volume_id, request.target):
            volume = await self.restorer.adopt(request)
        if volume is not None and self.store.has_files(request.volume_id):
            return volume
        self.volumes.forget(request.volume_id)
        return None

    async def _publish_first(self, request: PublishRequest) -> None:
        declaration = parse_declaration(request, self.kubelet_dir)
        self.reload_rules.check(declaration.spec, request.pod)
        self.budget.admit(request.volume_id, request.pod, declaration.spec.names.size)
        try:
            await self._publish_admitted(request, declaration)
        except BaseException:
            # A call can also be cancelled after the volume is published.
            if self.volumes.get(request.volume_id) is None:
                self.budget.release(request.volume_id)
            raise

    async def _publish_admitted(self, request: PublishRequest, declaration: Declaration) -> None:
        # The tmpfs is mounted while the issuer works.
        new: list[bool] = []
        created = asyncio.create_task(
            self.mounter.run(request.pod, lambda: new.append(self.store.create(request.volume_id)))
        )
        try:
            volume = await self._publish_in(created, request, declaration)
        except BaseException:
            created.cancel()
            # All of it, also if the kubelet cancels the call meanwhile.
            await to_the_end(self._undo(created, new, request.volume_id, declaration.target))
            raise
        self.volumes.keep(volume)
        self.renewals.keep(volume)
        await self.roots.catch_up(volume)
        record, root_only = volume.record, volume.spec.root_only
        times = {} if root_only else {"not_after": record.not_after, "renew_at": record.renew_at}
        log.info("volume published", names=str(volume.spec.names), **times, interim=record.interim, root_only=root_only)

    async def _undo(self, created: Awaitable[object], new: Sequence[bool], volume_id: str, target: Path) -> None:
        await asyncio.gather(created, return_exceptions=True)
        if new != [False]:  # the volume directory did not exist before
            await in_thread(None, self._remove, volume_id, target)

    async def _publish_in(
        self, created: Awaitable[object], request: PublishRequest, declaration: Declaration
    ) -> Volume:
        """Publish the volume in the volume directory that ``created`` waits for."""
        spec = declaration.spec
        if spec.root_only:
            volume, contents = self._with_roots(request, declaration)
        else:
            volume, contents = await self._with_certificate(request, declaration)
        files = volume.files(self.store.files_dir(request.volume_id))
        # Only stores take long to render. A thread costs more than the other formats.
        rendered = await in_thread(None, files.render, contents) if spec.layout.has_stores else files.render(contents)
        self.budget.resize(request.volume_id, request.pod, len(volume.record.to_json()), rendered.sizes)
        await created
        await self.mounter.run(request.pod, lambda: self._write_and_bind(volume, declaration.target, files, rendered))
        return volume

    async def _with_certificate(
        self, request: PublishRequest, declaration: Declaration
    ) -> tuple[Volume, VolumeContents]:
        spec, password = declaration.spec, declaration.password
        obtained = await self.certificates.obtain(
            CertificateRequest(request.volume_id, request.pod, spec, request.token)
        )
        record = new_record(
            request, obtained.issued_at, obtained.renew_at, obtained.not_after, interim=obtained.interim
        )
        volume = Volume(record, spec, request.token, password=password)
        volume.root_sets = self.roots.accept_response(volume.trusted_names, obtained.root_sets)
        roots = merge_roots(volume.root_sets, volume.trusted_names)
        return volume, obtained.contents(roots, store_password(spec.layout, password))

    def _with_roots(self, request: PublishRequest, declaration: Declaration) -> tuple[Volume, VolumeContents]:
        spec, password = declaration.spec, declaration.password
        sets = self.roots.select(spec.issuer, spec.federations)
        record = new_record(request, self.renewals.clock())
        volume = Volume(record, spec, request.token, root_sets=sets, password=password)
        roots = parse_roots(merge_roots(sets, volume.trusted_names))
        return volume, VolumeContents(None, (), roots, store_password(spec.layout, password))

    def _write_and_bind(self, volume: Volume, target: Path, files: VolumeFiles, rendered: RenderedVolume) -> None:
        """Write the files and the record, then bind them to the target path. On failure remove them."""
        volume_id = volume.record.volume_id
        try:
            files.write_rendered(rendered, volume.record.issued_at)
            self.store.write_record(volume.record)
            self.store.bind(volume_id, target)
        except BaseException:
            self._remove(volume_id, target)
            raise

    def _remove(self, volume_id: str, target: Path) -> None:
        try:
            self.store.unbind(target)  # first: a mount of a removed volume would show an empty directory
        finally:
            self.store.remove(volume_id)

    async def _update_password(self, volume: Volume, request: PublishRequest) -> None:
        """Encrypt the stores with the present password of the pod's Secret."""
        password = parse_password(request, volume.spec.layout)
        if password is not None and password != volume.password:
            files = volume.files(self.store.files_dir(request.volume_id))
            if await in_thread(None, files.replace_password, password, self.renewals.clock()):
                self.volumes.files_replaced(volume)
                self.budget.measure(request.volume_id, volume.pod)
                log.info("password of the stores updated")
            volume.password = password

    async def _republish(self, volume: Volume, request: PublishRequest) -> None:
        """Keep the newer token, and restore the mount if it was removed. Does no I/O if the volume is healthy."""
        if request.token is not None:
            if volume.token is None or request.token.claims.expires_at >= volume.token.claims.expires_at:
                volume.token = request.token
            self.renewals.token_received(volume)
        target = Path(request.target)
        if str(target) in volume.record.targets and self.store.is_healthy(volume.record.volume_id, target):
            return
        target = check_target(self.kubelet_dir, request.target, request.pod.uid)
        await in_thread(None, self.store.bind, volume.record.volume_id, target)
        if str(target) not in volume.record.targets:
            volume.record = replace(volume.record, targets=(*volume.record.targets, str(target)))
            await in_thread(None, self.store.write_record, volume.record)
        log.info("volume mounted again", target=str(target))
