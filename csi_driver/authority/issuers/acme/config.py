"""The configuration of an ACME issuer in the issuers file. Parsing it does not need the ACME libraries."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta

from csi_driver.authority.issuers import Issuer
from csi_driver.authority.issuers.config_section import ConfigSection
from csi_driver.authority.issuers.dependencies import IssuerDependencies, IssuerKind, not_possible
from csi_driver.authority.storage import DirectoryStore, Store
from csi_driver.core.config.document_reader import DocumentReader, Path
from csi_driver.core.config.issuers import CredentialSource, SecretSource, parse_file_name, parse_secret_name
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.names import EmailAddress
from csi_driver.core.spec import DEFAULT_ISSUER

STAGING = "https://acme-staging-v02.api.letsencrypt.org/directory"  # untrusted certificates, high limits
PRODUCTION = "https://acme-v02.api.letsencrypt.org/directory"  # the only CA whose roots need no configuration
DNS_PATIENCE = timedelta(minutes=2)
HTTP_PATIENCE = timedelta(minutes=1)
_KEYS = (
    "account", "directory", "email", "terms_agreed", "eab", "dns01", "http01", "ca", "roots", "profile",
    "preferred_chain", "while_pending",
)  # fmt: skip
_MAX_SERVERS = 10
_MAX_TSIG_SECRETS = 100
_DIRECTORY = re.compile(r"https://[A-Za-z0-9._:\[\]-]+(?:/[!-~]*)?", re.ASCII)
_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?", re.ASCII)
_IPV6 = re.compile(r"[0-9A-Fa-f]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*", re.ASCII)
_OTHER_PORT = re.compile(r"(?P<host>[A-Za-z0-9._-]+)(?:[#@]| +(?:port +)?)(?P<port>[0-9]{1,5})", re.ASCII)
_ZONE = re.compile(r"[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?", re.ASCII)
_LINE = re.compile(r"(?=.*[!-~])[ -~]{1,200}", re.ASCII)
_WORD = re.compile(r"[!-~]{1,100}", re.ASCII)


@dataclass(frozen=True, slots=True)
class AccountStorage:
    """Where the account and the orders are stored: in a Secret that all replicas share, or in a directory of one replica."""

    namespace: str = ""
    name: str = ""
    directory: str = ""  # Empty if it is a Secret


@dataclass(frozen=True, slots=True)
class ExternalAccount:
    """An existing account at the CA to which the ACME account is bound (RFC 8555 section 7.3.4)."""

    key_id: str
    key: CredentialSource  # The MAC key in base64url, as CAs provide it


@dataclass(frozen=True, slots=True)
class Dns01:
    """How to solve DNS-01 challenges (RFC 8555 section 8.4) with DNS UPDATE (RFC 2136)."""

    server: str  # The server that accepts updates, `ADDRESS` or `ADDRESS:PORT`: the primary of the zone
    key: CredentialSource | None = None  # The TSIG key. None if the server authorizes by address, which is unsafe
    zone: str | None = None  # The zone for the records; None to ask `server` for the zone of each name
    resolvers: tuple[str, ...] = ()  # For CNAMEs and server addresses, for split horizons; empty: the system's
    nameservers: tuple[str, ...] = ()  # Must serve a record before the CA validates it; empty: those in NS records
    patience: timedelta = DNS_PATIENCE  # For secondaries: seconds with NOTIFY, else up to their refresh interval
    tsig_secrets: tuple[
        str, ...
    ] = ()  # NAMESPACE/NAME of the Secrets whose keys a certificate for a Secret can request

    def with_key_of(self, tsig_secret: str) -> Dns01:
        """Return the configuration with the key of a Secret; raise CertmountError if it is not one of ``tsig_secrets``."""
        if tsig_secret not in self.tsig_secrets:
            hint = "ask an administrator to add it to dns01.tsig_secrets of the issuer"
            fault = Fault("tsigSecretName", f"{tsig_secret} is not a Secret that the issuer can use", hint)
            raise CertmountError(Reason.NAME_NOT_ALLOWED, fault)
        return replace(self, key=SecretSource(*parse_secret_name(tsig_secret), "tsig", only=True))


@dataclass(frozen=True, slots=True)
class Http01:
    """How to solve HTTP-01 challenges (RFC 8555 section 8.3). The authority responds; a route must lead the CA to it."""

    self_test: str | None = None
    """Where the self-test connects, for clusters that can't reach their own load balancer; None: port 80 of the name."""
    ingress_class: str | None = None  # The class of the Ingress to create for each challenge; None if a route exists
    patience: timedelta = HTTP_PATIENCE  # How long load balancers and ingress controllers may take for a new route


@dataclass(frozen=True, slots=True)
class AcmeConfiguration:
    """One account at one CA, and how to solve challenges."""

    account: AccountStorage
    email: str | None = None  # The contact address. Each address has its own account.
    directory: str = STAGING
    terms_agreed: bool = False  # True if the administrator agrees to the CA's terms of service
    dns01: Dns01 | None = None  # Has precedence over http01, because it also supports wildcards
    http01: Http01 | None = None
    external_account: ExternalAccount | None = None
    ca_file: str | None = None  # PEM of the roots of the directory's own TLS certificate; None for public CAs
    roots_file: str | None = None  # PEM of the roots that pods trust; None is possible only for PRODUCTION
    profile: str | None = None  # A certificate profile of the CA; None for the CA's default
    preferred_chain: str | None = None  # Common name of the root of the preferred chain, if the CA offers several
    while_pending: str | None = None  # The issuer of interim certificates; None if pods wait for the CA


def parse_acme(reader: DocumentReader, path: Path, value: object) -> AcmeConfiguration | None:
    section = ConfigSection(reader, path, value, _KEYS, required=("account",))
    if not section.values:
        return None
    if section.values.get("dns01") is None and section.values.get("http01") is None:
        section.fault("", "has no challenge solver", "set dns01, http01 or both")
    if "roots" not in section.values and section.values.get("directory") != PRODUCTION:
        hint = "set {file: PATH} with the CA's roots; only Let's Encrypt's production environment needs none"
        section.fault("roots", "is missing", hint)
    return AcmeConfiguration(
        _parse_account(section),
        email=section.text("email", lambda text: EmailAddress.parse(text).text),
        directory=section.text("directory", _matching(_DIRECTORY, f"is not an ACME directory, such as {STAGING}"))
        or STAGING,
        terms_agreed=section.boolean("terms_agreed"),
        dns01=_parse_dns01(section),
        http01=_parse_http01(section),
        external_account=_parse_external_account(section),
        ca_file=section.file("ca"),
        roots_file=section.file("roots"),
        profile=section.text("profile", _matching(_WORD, "is not the name of a profile")),
        preferred_chain=section.text("preferred_chain", _matching(_LINE, "is not the common name of a root")),
        while_pending=section.text("while_pending", _parse_while_pending),
    )


def _parse_account(parent: ConfigSection) -> AccountStorage:
    section = parent.section("account", ("secret", "directory"))
    if section is None:  # already reported as missing
        return AccountStorage()
    if ("secret" in section.values) == ("directory" in section.values):
        hint = "set `{secret: NAMESPACE/NAME}`, or `{directory: PATH}` for an authority with one replica"
        section.fault("", "does not set where the account and the orders are stored", hint)
    secret = section.text("secret", parse_secret_name)
    return AccountStorage(*(secret or ("", "")), directory=section.text("directory", parse_file_name) or "")


def _parse_dns01(parent: ConfigSection) -> Dns01 | None:
    keys = ("server", "tsig", "tsig_secrets", "zone", "resolvers", "nameservers", "patience")
    section = parent.section("dns01", keys, required=("server",))
    if section is None:
        return None
    return Dns01(
        section.text("server", _parse_address) or "",
        section.credential("tsig"),
        section.text("zone", _parse_zone),
        section.texts("resolvers", _parse_address, _MAX_SERVERS),
        section.texts("nameservers", _parse_address, _MAX_SERVERS),
        section.duration("patience", DNS_PATIENCE),
        section.texts("tsig_secrets", _parse_secret, _MAX_TSIG_SECRETS),
    )


def _parse_secret(text: str) -> str:
    parse_secret_name(text)
    return text


def _parse_http01(parent: ConfigSection) -> Http01 | None:
    section = parent.section("http01", ("self_test", "ingress_class", "patience"))
    if section is None:
        return None
    return Http01(
        section.text("self_test", _parse_address),
        section.text("ingress_class", _matching(_WORD, "is not the name of an IngressClass")),
        section.duration("patience", HTTP_PATIENCE),
    )


def _parse_external_account(parent: ConfigSection) -> ExternalAccount | None:
    section = parent.section("eab", ("key_id", "key"), required=("key_id", "key"))
    key_id = section and section.text("key_id", _parse_key_id)
    key = section and section.credential("key")
    return ExternalAccount(key_id, key) if key_id and key else None


def _parse_address(text: str) -> str:
    match = _ADDRESS.fullmatch(text)
    if match is not None and 0 < int(match["port"] or "53") < 65536:
        return text
    problem = "is not ADDRESS or ADDRESS:PORT"
    if match is not None:
        problem = f"has the port {match['port']}; expected 1 to 65535"
    elif "://" in text:
        problem = "is a URL; expected ADDRESS or ADDRESS:PORT, without a scheme"
    elif _IPV6.fullmatch(text):
        problem = f"is an IPv6 address without brackets; write [{text}] or [{text}]:PORT"
    elif other := _OTHER_PORT.fullmatch(text):
        problem = f"has its port in another form; write {other['host']}:{other['port']}"
    raise ValueError(problem)


def _parse_zone(text: str) -> str:
    return _matching(_ZONE, "is not the name of a zone, such as acme.example.com")(text).removesuffix(".")


def _parse_key_id(text: str) -> str:
    if text != text.strip():
        raise ValueError("has white space or a line break around it; in YAML, write it after `key_id:`, without `|`")
    return _matching(_WORD, "is not a key id: it has spaces, other than ASCII characters, or more than 100 of them")(
        text
    )


def _parse_while_pending(text: str) -> str:
    if text != DEFAULT_ISSUER:
        raise ValueError(f"is not {DEFAULT_ISSUER}, the only issuer that signs immediately")
    return text


def _matching(pattern: re.Pattern[str], problem: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not pattern.fullmatch(text):
            raise ValueError(problem)
        return text

    return parse


def _make(name: str, configuration: AcmeConfiguration, dependencies: IssuerDependencies) -> Issuer:
    try:
        from csi_driver.authority.issuers.acme.issuer import AcmeIssuer
    except ModuleNotFoundError as error:
        raise not_possible(name, f"needs the package {error.name}", "install certmount[acme]") from None
    account, http01 = configuration.account, configuration.http01
    if account.directory:
        store: Store = DirectoryStore(pathlib.Path(account.directory), f"acme-{name}.json")
    elif dependencies.secret_store is not None:
        store = dependencies.secret_store(account.namespace, account.name)
    else:
        raise not_possible(name, "needs a cluster for its account Secret", "set `account: {directory: PATH}`")
    routes = None
    if http01 is not None and http01.ingress_class is not None:
        if dependencies.ingress_routes is None:
            raise not_possible(name, "needs a cluster for its Ingresses", "omit http01.ingress_class")
        routes = dependencies.ingress_routes(http01.ingress_class)
    count = dependencies.order_counter(name)
    return AcmeIssuer(name, configuration, store, dependencies.credentials, routes=routes, count_order=count)


KIND = IssuerKind(parse_acme, _make)
