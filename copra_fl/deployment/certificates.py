"""TLS and node keys of a deployment, with the `cryptography` library that Flower brings.

A CA of the deployment's own signs the server's certificate; clients trust that CA and no other. Each node has a key
pair: with the private key it signs its requests, and the SuperLink knows the public one (Flower reads both in
OpenSSH's format and wants a NIST curve).
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

from copra_fl.deployment.layout import Folder, client_name, write_private

CA_DAYS = 3650
#: the longest that today's TLS libraries accept; `deploy init` on the same folder makes a new certificate
SERVER_DAYS = 825
#: what every server certificate is good for: the compose service, and health checks and the operator inside it
ALWAYS = ("superlink", "localhost", "127.0.0.1", "::1")


def make_ca(folder: Folder) -> None:
    """The deployment's CA, unless it has one."""
    certificate = folder.tls / "ca.crt"
    if certificate.exists() and folder.ca_key.exists():
        return
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"copra-fl CA of {folder.root.name}"[:64])])
    builder = _certificate(name, name, key.public_key(), key.public_key(), CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    write_private(folder.ca_key, _pem(key))
    certificate.write_bytes(builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM))


def make_server_certificate(folder: Folder, hosts: Iterable[str]) -> None:
    """A new key and certificate of the server, for `ALWAYS` and `hosts`: names or IP addresses."""
    ca = x509.load_pem_x509_certificate((folder.tls / "ca.crt").read_bytes())
    ca_key = serialization.load_pem_private_key(folder.ca_key.read_bytes(), password=None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "copra-fl SuperLink")])
    builder = _certificate(name, ca.subject, key.public_key(), ca_key.public_key(), SERVER_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    names = [_general_name(host) for host in dict.fromkeys((*ALWAYS, *hosts))]
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    write_private(folder.tls / "server.key", _pem(key))
    certificate = builder.sign(ca_key, hashes.SHA384())
    (folder.tls / "server.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def make_node_keys(folder: Folder, num_clients: int) -> None:
    """A key pair for each client's node that has none: the private key to the client, the public one to the server.

    A client that has moved to its own machine is known here by its public key alone. Those of clients from
    `num_clients` on are removed, so that they are turned away.
    """
    names = [client_name(number) for number in range(num_clients)]
    for number, name in enumerate(names):
        client, public = folder.client(number), folder.nodes / f"{name}.pub"
        (client.tls / "ca.crt").write_bytes((folder.tls / "ca.crt").read_bytes())
        if not client.key.exists() and not public.exists():
            make_node_key(client.key)
        if client.key.exists():
            public.write_bytes(public_key(client.key))
    for public in folder.nodes.glob("*.pub"):
        if public.stem not in names:
            public.unlink()


def make_node_key(path: Path) -> None:
    """A new private key, as `ssh-keygen -t ecdsa -b 384` makes it."""
    key = ec.generate_private_key(ec.SECP384R1())
    openssh = serialization.PrivateFormat.OpenSSH
    write_private(path, key.private_bytes(serialization.Encoding.PEM, openssh, serialization.NoEncryption()))


def public_key(path: Path) -> bytes:
    """The public key of the private key in the file `path`, as OpenSSH writes it."""
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
    # An hour back: clocks of other machines may be behind.
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
