"""Verification: the shipped testinfra suite, what it is given, and the report it makes.

``expectation`` (pure) writes down what must hold; ``suite/`` judges, knows nothing but that document and the host's
evidence, and imports nothing of the code it judges; ``plugin`` runs it under pytest; ``run`` runs pytest and reports.
"""

EXPECTATION_VERSION = 1
"""Of the file that says what is expected of a host (``expectation``), which the suite reads."""
