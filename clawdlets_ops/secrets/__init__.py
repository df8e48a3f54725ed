"""Secrets of a host: what it needs (plan), the encrypted files in the repository (store), the install payload."""
