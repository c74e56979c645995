"""TLS certificates and node keys of a deployment, made with the `cryptography` library that Flower depends on.

A CA of the deployment signs the server's certificate; clients trust that CA and no other. Each node has a key pair: it
signs its requests with the private key, and the SuperLink knows the public one. Flower reads both in OpenSSH's format
and requires a NIST curve.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from copra_fl.config import ConfigError
from copra_fl.deployment.layout import DeploymentLayout, client_name, write_mounted
from copra_fl.files import atomic_write
from copra_fl.secure_aggregation.keys import new_identity, public_identity

CA_DAYS = 3650
#: the longest validity that today's TLS libraries accept; `deploy rotate --certificate` makes a new certificate
SERVER_DAYS = 825
#: the certificates of a deployment in its tls/ folder
CERTIFICATES = {"server": "server.crt", "ca": "ca.crt"}
#: an end of validity that is nearer than this is shown as a warning
WARNING_DAYS = 60
#: hosts in every server certificate: the compose service, and localhost for health checks and operators inside it
STANDARD_HOSTS = ("superlink", "localhost", "127.0.0.1", "::1")


def make_ca(layout: DeploymentLayout) -> None:
    """Make the deployment's CA, unless it exists: its key may be kept elsewhere."""
    certificate = layout.tls / CERTIFICATES["ca"]
    if certificate.exists():
        return
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"copra-fl CA of {layout.root.name}"[:64])])
    builder = _certificate(name, name, key.public_key(), key.public_key(), CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    atomic_write(layout.ca_key, _pem(key), 0o600)
    write_mounted(certificate, builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM))


def make_server_certificate(layout: DeploymentLayout, hosts: Iterable[str]) -> None:
    """Make a new key and certificate of the server, for `STANDARD_HOSTS` and `hosts` (names or IP addresses).

    The certificate ends with the CA's at the latest. Raises ConfigError without the CA's key.
    """
    if not layout.ca_key.exists():
        raise ConfigError(f"a new server certificate needs the key of the CA: put it back as {layout.ca_key}")
    ca = x509.load_pem_x509_certificate((layout.tls / "ca.crt").read_bytes())
    ca_key = serialization.load_pem_private_key(layout.ca_key.read_bytes(), password=None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "copra-fl SuperLink")])
    builder = _certificate(name, ca.subject, key.public_key(), ca_key.public_key(), SERVER_DAYS, ca.not_valid_after_utc)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(_names(hosts)), critical=False)
    certificate = builder.sign(ca_key, hashes.SHA384())
    write_mounted(layout.tls / "server.key", _pem(key), 0o600)
    write_mounted(layout.tls / "server.crt", certificate.public_bytes(serialization.Encoding.PEM))


def is_for(layout: DeploymentLayout, hosts: Iterable[str]) -> bool:
    """Return True if the server has a certificate by the CA for exactly `STANDARD_HOSTS` and `hosts`."""
    path = layout.tls / CERTIFICATES["server"]
    if not path.exists():
        return False
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    try:
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate((layout.tls / "ca.crt").read_bytes()))
    except InvalidSignature:
        return False
    return set(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value) == set(_names(hosts))


def ends(tls: Path) -> dict[str, datetime]:
    """Return the end of validity of each of `CERTIFICATES` in the folder `tls`; those that are missing are left out."""
    paths = {name: tls / file for name, file in CERTIFICATES.items()}
    return {
        name: x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
        for name, path in paths.items()
        if path.exists()
    }


def days_left(tls: Path) -> dict[str, int]:
    """Return the whole days for which each of `CERTIFICATES` is still valid; negative for one that has ended."""
    now = datetime.now(UTC)
    return {name: (end - now).days for name, end in ends(tls).items()}


def make_node_keys(layout: DeploymentLayout, numbers: Iterable[int]) -> None:
    """Register the clients `numbers`: private keys in the clients' folders, public keys in the server's.

    A client that has a key keeps it; one that has moved to its own machine may have only its public key here.
    """
    for number in numbers:
        client, public = layout.client(number), layout.public_key(number)
        if not client.key.exists() and not public.exists():
            make_node_key(client.key)
        if client.key.exists():
            write_mounted(public, public_key(client.key))


def make_peer_keys(layout: DeploymentLayout, num_clients: int) -> None:
    """Make the missing key pairs with which nodes sign in secure aggregation, and forget those of removed clients."""
    for number in range(num_clients):
        client, public = layout.client(number), layout.peer_public_key(number)
        if not client.peer_key.exists() and not public.exists():
            make_node_key(client.peer_key)
        if client.peer_key.exists() and not public.exists():
            write_mounted(public, public_key(client.peer_key))
    for public in layout.peers.glob("*.pub"):
        if public.stem not in map(client_name, range(num_clients)):
            public.unlink()
    share_peer_keys(layout, num_clients)


def replace_keys(layout: DeploymentLayout, number: int, num_clients: int) -> None:
    """Make new keys for one client and register them: its node key, and the one it signs with in secure aggregation."""
    client = layout.client(number)
    for private, public in (
        (client.key, layout.public_key(number)),
        (client.peer_key, layout.peer_public_key(number)),
    ):
        make_node_key(private)
        write_mounted(public, public_key(private))
    share_peer_keys(layout, num_clients)


def share_ca(layout: DeploymentLayout, num_clients: int) -> None:
    """Copy the CA's certificate into the folders of the clients that have another one, or none."""
    certificate = (layout.tls / CERTIFICATES["ca"]).read_bytes()
    for number in range(num_clients):
        path = layout.client(number).tls / CERTIFICATES["ca"]
        if not path.exists() or path.read_bytes() != certificate:
            write_mounted(path, certificate)


def share_peer_keys(layout: DeploymentLayout, num_clients: int) -> None:
    """Give every client the public keys with which its peers sign in secure aggregation."""
    keys = {path.name: path.read_bytes() for path in layout.peers.glob("*.pub")}
    for peers in (layout.client(number).peers for number in range(num_clients)):
        for path in peers.glob("*.pub"):
            if path.name not in keys:
                path.unlink()
        for name, content in keys.items():
            if not (peers / name).exists() or (peers / name).read_bytes() != content:
                write_mounted(peers / name, content)


def surplus_keys(layout: DeploymentLayout, num_clients: int) -> list[Path]:
    """Return the registered public keys that belong to none of `num_clients` clients."""
    registered = {layout.public_key(number) for number in range(num_clients)}
    return sorted(path for path in layout.nodes.glob("*.pub") if path not in registered)


def make_node_key(path: Path) -> None:
    """Write a new private key to the file `path`."""
    write_mounted(path, new_identity(), 0o600)


def public_key(path: Path) -> bytes:
    """Return the public key of the private key in the file `path`, in OpenSSH's format."""
    return public_identity(path.read_bytes()) + b"\n"


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    days: int,
    latest: datetime | None = None,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    end = now + timedelta(days=days)
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key)
    builder = builder.serial_number(x509.random_serial_number())
    # Valid from an hour ago, because the clocks of other machines may be behind.
    builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(min(end, latest or end))
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    return builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _names(hosts: Iterable[str]) -> list[x509.GeneralName]:
    return [_general_name(host) for host in dict.fromkeys((*STANDARD_HOSTS, *hosts))]


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
