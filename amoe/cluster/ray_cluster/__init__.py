"""Workers as actors of a Ray cluster. Ray is the control plane: it finds room on hosts, starts and ends processes, and
keeps their logs. Tokens and control messages go between the workers by themselves, as on one host.

    session.py    a connection to a Ray cluster, or a new local one
    listeners.py  what Ray asks the head of, in this process
    names.py      names in the cluster, each of which one may have
    placement.py  room for workers: which resources each needs, and placement groups of them
    actor.py      a worker inside its actor
    reach.py      whether workers' hosts reach each other, before they need to
    handle.py     one life of a worker, as the server sees it
    launcher.py   `RayLauncher`, which puts these together

Nothing but these files and `amoe.cluster.ray_serve` imports Ray.
"""

from amoe.cluster.ray_cluster.launcher import RayLauncher as RayLauncher
