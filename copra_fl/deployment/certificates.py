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
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from copra_fl.deployment.layout import DeploymentLayout, client_name, write_private

CA_DAYS = 3650
#: the longest validity that today's TLS libraries accept; `deploy init` on the same folder makes a new certificate
SERVER_DAYS = 825
#: hosts in every server certificate: the compose service, and localhost for health checks and operators inside it
STANDARD_HOSTS = ("superlink", "localhost", "127.0.0.1", "::1")


def make_ca(layout: DeploymentLayout) -> None:
    """Make the deployment's CA, unless it exists."""
    certificate = layout.tls / "ca.crt"
    if certificate.exists() and layout.ca_key.exists():
        return
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"copra-fl CA of {layout.root.name}"[:64])])
    builder = _certificate(name, name, key.public_key(), key.public_key(), CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    write_private(layout.ca_key, _pem(key))
    certificate.write_bytes(builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM))


def make_server_certificate(layout: DeploymentLayout, hosts: Iterable[str]) -> None:
    """Make a new key and certificate of the server, for `STANDARD_HOSTS` and `hosts` (names or IP addresses)."""
    ca = x509.load_pem_x509_certificate((layout.tls / "ca.crt").read_bytes())
    ca_key = serialization.load_pem_private_key(layout.ca_key.read_bytes(), password=None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "copra-fl SuperLink")])
    builder = _certificate(name, ca.subject, key.public_key(), ca_key.public_key(), SERVER_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    names = [_general_name(host) for host in dict.fromkeys((*STANDARD_HOSTS, *hosts))]
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    write_private(layout.tls / "server.key", _pem(key))
    certificate = builder.sign(ca_key, hashes.SHA384())
    (layout.tls / "server.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def make_node_keys(layout: DeploymentLayout, num_clients: int) -> None:
    """Make the missing key pairs of nodes: private keys in the clients' folders, public keys in the server's.

    A client that has moved to its own machine may have only its public key here; it keeps it. Public keys of clients
    from `num_clients` on are removed, so that the SuperLink rejects their nodes.
    """
    names = [client_name(number) for number in range(num_clients)]
    for number, name in enumerate(names):
        client, public = layout.client(number), layout.nodes / f"{name}.pub"
        (client.tls / "ca.crt").write_bytes((layout.tls / "ca.crt").read_bytes())
        if not client.key.exists() and not public.exists():
            make_node_key(client.key)
        if client.key.exists():
            public.write_bytes(public_key(client.key))
    for public in layout.nodes.glob("*.pub"):
        if public.stem not in names:
            public.unlink()
    share_public_keys(layout, num_clients)


def share_public_keys(layout: DeploymentLayout, num_clients: int) -> None:
    """Give every client the public keys of all nodes: secure aggregation takes no others for peers."""
    keys = {path.name: path.read_bytes() for path in layout.nodes.glob("*.pub")}
    for peers in (layout.client(number).peers for number in range(num_clients)):
        for path in peers.glob("*.pub"):
            if path.name not in keys:
                path.unlink()
        for name, content in keys.items():
            (peers / name).write_bytes(content)


def make_node_key(path: Path) -> None:
    """Make a private key, as `ssh-keygen -t ecdsa -b 384` does."""
    key = ec.generate_private_key(ec.SECP384R1())
    openssh = serialization.PrivateFormat.OpenSSH
    write_private(path, key.private_bytes(serialization.Encoding.PEM, openssh, serialization.NoEncryption()))


def public_key(path: Path) -> bytes:
    """Return the public key of the private key in the file `path`, in OpenSSH's format."""
    public = serialization.load_ssh_private_key(path.read_bytes(), password=None).public_key()
    return public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH) + b"\n"


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key)
    builder = builder.serial_number(x509.random_serial_number())
    # Valid from an hour ago, because the clocks of other machines may be behind.
    builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=days))
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


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
