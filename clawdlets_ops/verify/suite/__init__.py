"""The check catalogue: one test per claim of the security model. Run with ``-p clawdlets_ops.verify.plugin``.

A test is given ``expected`` (the expectation document), ``facts`` (what the host said of itself, in one exec), ``exposure``
(port 22 as seen from every vantage) and ``attempt`` (logins that must be refused). It raises Fault, Unknown or
NotApplicable, or notes with ``observe`` what it saw. Nothing here reaches out by itself.
"""
