"""Writes an image archive holding static busybox; also the pod sandbox image. Usage: busybox_image.py REF OUT.tar"""

import hashlib
import io
import json
import sys
import tarfile

ref, out = sys.argv[1:]
layer_file = io.BytesIO()
with tarfile.open(fileobj=layer_file, mode="w") as layer:
    for name in ("bin", "tmp", "etc", "dev", "proc", "sys", "run", "var"):
        entry = tarfile.TarInfo(name)
        entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
        layer.addfile(entry)
    layer.add("/bin/busybox", "bin/busybox")
    for applet in [
        "sh",
        "cat",
        "ls",
        "sleep",
        "wget",
        "nc",
        "stat",
        "touch",
        "id",
        "mount",
        "df",
        "date",
        "head",
        "grep",
    ]:
        entry = tarfile.TarInfo(f"bin/{applet}")
        entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
        layer.addfile(entry)
    passwd = b"root:x:0:0:root:/:/bin/sh\n"
    entry = tarfile.TarInfo("etc/passwd")
    entry.size = len(passwd)
    layer.addfile(entry, io.BytesIO(passwd))
blob = layer_file.getvalue()
digest = hashlib.sha256(blob).hexdigest()
wait = 'trap "exit 0" TERM INT; while :; do sleep 1000000 & wait $!; done'
config = json.dumps(
    {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["/bin/sh", "-c", wait], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        "history": [{}],
    }
).encode()
config_name = hashlib.sha256(config).hexdigest() + ".json"
manifest = json.dumps([{"Config": config_name, "RepoTags": [ref], "Layers": [f"{digest}/layer.tar"]}]).encode()
with tarfile.open(out, "w") as archive:
    for name, data in ((config_name, config), (f"{digest}/layer.tar", blob), ("manifest.json", manifest)):
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
