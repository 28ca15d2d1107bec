"""What to use for attributes, annotations and fields of other projects that issue certificates to pods.

They come from cert-manager's csi-driver, csi-driver-spiffe and annotations, autocert, SPIRE, Istio, Secrets Store CSI and
the projected volume ``podCertificate``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

_REMOVE = "remove it"
_STORES = "use keystore-file or truststore-file for PKCS#12, or files: java"
_KEY_TYPE = "use key-type, for example EC-P256 or RSA-2048"
_SUBJECT = "use subject, for example O=Example,OU=Shop"
_HINTS = {
    "use common-name": "commonname cn",
    _SUBJECT: "literal-subject organization organizations organizational-unit organizational-units org ou",
    f"certmount never issues CA certificates; {_REMOVE}": "is-ca isca ca basic-constraints max-path-len path-length certificate-authority",
    "use name and dns-names, ip-sans, uri-sans or email-sans, one attribute for each type": (
        "sans san alt-names altnames alternative-names subject-alt-names subject-alternative-names hosts hostnames domains"
    ),
    "use dns-names": "dns dns-name dns-sans dns-alt-names dnssans",
    "use uri-sans": "uri uris uri-names url urls",
    "use ip-sans": "ip ips ip-address ip-addresses ipaddresses ip-names",
    "use email-sans": "email emails email-address email-addresses emailaddresses email-names",
    "use duration": "ttl lifetime validity expiry expiration expires not-after max-expiration-seconds cert-ttl workload-cert-ttl",
    "use renew-before": "renew rotate-before rotation-poll-interval renew-before-percentage secret-ttl-grace-period",
    _KEY_TYPE: "key-algorithm key-size key-algo private-key-algorithm private-key-size algorithm key curve rsa-bits",
    "use usages with server, client or both": "key-usages key-usage ext-key-usage extended-key-usages eku usage",
    "use issuer with the name of an issuer in the issuers file": (
        "issuer-name issuer-ref cluster-issuer ca-name signer signer-name provisioner acme-issuer acme-server"
    ),
    f"issuer identifies the issuer by its name alone; {_REMOVE}": "issuer-kind issuer-group",
    'every certificate contains the SPIFFE ID of the pod\'s service account; remove it, or use uri-sans and spiffe: "false"': (
        "spiffe-id spiffeid svid trust-domain workload-selector service-account serviceaccount identity"
    ),
    "use federations to trust more roots": (
        "bundle trust-bundle trust-bundles federates-with bundle-name ca-bundle roots trust-anchors"
    ),
    "use uid and gid for the owner of the key": "owner run-as-user user group",
    "use key-mode for the mode of the key": "mode default-mode file-mode file-permission",
    "use key-file": "privatekey-file private-key-file key-path",
    "use certificate-file": "cert-file certificate-chain-path certificate-path",
    "use bundle-file": "credential-bundle-path output-certs",
    "use files, or certificate-file, key-file and ca-file, to name the files": "file-name filename object-name",
    f"the path is in the volumeMounts of the container; {_REMOVE}": "mount-path",
    "use key-encoding": "private-key-encoding key-format encoding format",
    _STORES: "pkcs12-enable pkcs12 keystore truststore",
    "use keystore-file": "pkcs12-filename keystore-filename",
    "use truststore-file": "truststore-filename",
    "set nodePublishSecretRef to a Secret with the key password": "pkcs12-password keystore-password",
    "use keystore-file; Java 9 and newer read PKCS#12": "jks jks-enable",
    "use reuse-key": "reuse-private-key private-key-rotation-policy rotation-policy",
    f"certmount has no init containers and sidecars; {_REMOVE}": "init-first bootstrapper-only inject injected",
    f"certmount stores no certificates in Secrets; {_REMOVE}": (
        "secret-provider-class revision-history-limit allow-direct-injection secret secret-name secret-template"
    ),
}
_BY_KEY = {key: hint for hint, keys in _HINTS.items() for key in keys.split()}
_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])", re.ASCII)
_MAX_KEY = 64


def hint_for(key: str, known: Sequence[str]) -> str | None:
    """Return what to use instead of an unknown attribute, or None if it resembles none."""
    # Other projects prefix their attributes with a domain. Compare without it, in lower case with hyphens.
    plain = _WORD.sub("-", key.rpartition("/")[2][-_MAX_KEY:]).lower().replace("_", "-").replace(".", "-")
    if plain in known:
        return f"did you mean {plain}?"
    if plain in _BY_KEY:
        return _BY_KEY[plain]
    if plain.startswith("subject-"):
        return _SUBJECT
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.7)
    return f"did you mean {near[0]}?" if near else None
