"""The user at the other end of a connection on this machine, from Linux's table of connections."""

from __future__ import annotations

import ipaddress
import os
import struct
import sys
from pathlib import Path

Address = tuple[str, int]

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
#: state of an open connection in the tables; after its process has closed it, the tables say that root owns it
ESTABLISHED = "01"
#: The tables are not read in one step: a connection can be missed while others come and go.
ATTEMPTS = 3


def is_this_user(client: Address | None, server: Address | None) -> bool:
    """Return True if a connection comes from this machine (this container), from a process of this process's user.

    `client` and `server` are the addresses of its two ends. Where the kernel has no such tables (macOS), any user of
    this machine passes.
    """
    if client is None or server is None or not _parse(client[0]).is_loopback:
        return False
    if sys.platform != "linux":
        return True
    for _ in range(ATTEMPTS):
        if (user := connection_user(client, server)) is not None:
            return user == os.geteuid()
    return False


def connection_user(client: Address, server: Address) -> int | None:
    """Return the id of the user whose process has the open connection from `client` to `server`; None without one."""
    ends = {(_encode(client, mapped), _encode(server, mapped)) for mapped in (False, True)}
    for table in TABLES:
        if table.exists():
            for line in table.read_text().splitlines()[1:]:
                _, source, target, state, _, _, _, user, _, inode, *_ = line.split()
                if (source, target) in ends and state == ESTABLISHED and inode != "0":
                    return int(user)
    return None


def _parse(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return the address `host`, as IPv4 if it is an IPv4 address in IPv6."""
    address = ipaddress.ip_address(host)
    return getattr(address, "ipv4_mapped", None) or address


def _encode(end: Address, mapped: bool) -> str:
    """Return an address as the tables write it: 32-bit words in the machine's byte order; IPv4 in IPv6 if `mapped`."""
    packed = _parse(end[0]).packed
    if mapped and len(packed) == 4:
        packed = bytes(10) + b"\xff\xff" + packed
    words = struct.unpack(f">{len(packed) // 4}I", packed)
    return f"{struct.pack(f'={len(words)}I', *words).hex().upper()}:{end[1]:04X}"
