"""Decide whether an address is on this machine."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def is_loopback_host(name: str) -> bool:
    """Return whether a host name or an IP address is on this machine."""
    if name == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback


def is_loopback(url: str | None) -> bool:
    """Return whether the URL is on this machine, as that of a local AWS server is."""
    host = urlsplit(url).hostname or "" if url else ""
    # A client that connects to 0.0.0.0 reaches this machine.
    return is_loopback_host(host) or host == "0.0.0.0"  # noqa: S104 - compared with, never bound
