"""Cattle: throw-away servers that run one task for a bot, and are gone.

    labels     what a server of ours carries, all of it, and the name that it has                        [pure]
    orders     what a job asks for, with the declared defaults, within the declared caps                 [pure]
    userdata   the cloud-init document: what it holds, and what it must never hold                       [pure]
    personas   a persona's public files
    spawn      the life of one server: intended, ordered, watched, deleted; picked up where a worker died
    reap       which servers are to go, and their deletion
    keys       where a machine's auth key for the tailnet comes from
    wiring     the two kinds of job, ``cattle.spawn`` and ``cattle.reap``, for the orchestrator

What runs on the machine is in ``clawdlets_ops/hostfiles/cattle``; the lab's machines and the NixOS image take the same files.
"""
