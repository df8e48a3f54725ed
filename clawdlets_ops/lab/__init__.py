"""The lab: the whole workflow on one Linux machine, without an account.

An emulator of the Hetzner Cloud API on loopback whose servers are systemd machines and whose firewalls are nftables.
Production code never imports this package; tests and `clawdlets lab` do.
"""
