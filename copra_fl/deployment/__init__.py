"""A federation on real machines: one folder holds its keys, its compose files, its state and its runs.

folder.py         what lies where in it, and who may read it
certificates.py   the CA, the server's certificate, a key pair a node
compose.py        the compose files, for any number of clients
engine.py         docker compose or podman-compose
superlink.py      what the server's container runs: Flower's SuperLink behind a gate
gate.py           closes the operator's side of the SuperLink's port to the network
supernode.py      what a client's container runs: Flower's SuperNode
metrics.py        what the operator watches, for Prometheus
registration.py   the nodes whose keys the SuperLink knows
"""
