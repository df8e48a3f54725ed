"""Groups of commands that the command line is made of. The project's root is the context's object; the environment is in ``meta``
under ``ENVIRON``, put there by the surface that read it."""

ENVIRON = "clawdlets_ops.environ"
