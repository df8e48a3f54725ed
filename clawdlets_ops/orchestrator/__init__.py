"""clf-orchestrator: bots ask for work over a unix socket, and never hold the key that does it.

    jobs       what a job is, what a kind of job needs (validate, handler, clean-up), what a handler is given    [pure]
    clock      wall-clock milliseconds that do not jump while the process lives
    store      the database: file modes, schema and its version, one writer with group commit, errors in words
    queue      jobs in the store: enqueue, lease, heartbeat, complete, fail, cancel, prune
    tokens     one-time tokens in the store: issue, bind, redeem
    identity   who asks, from the socket's own credentials
    app        the unix socket's API (ASGI)
    bootstrap  the tailnet listener's API (ASGI): a machine's environment and its result
    vending    the variables that a machine may have, read from systemd credentials or /run/secrets
    tailnode   this host's address on the tailnet, and which machine another address is
    serving    uvicorn with bounds on connections, and the sockets
    worker     leases jobs and runs their handlers
    daemon     all of it together, from one configuration file
    client     a bot's side of the socket
    unixhttp   HTTP over a unix socket, with the standard library alone

SQL is in ``store``, ``queue`` and ``tokens`` and nowhere else.
"""
