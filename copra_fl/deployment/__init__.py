"""A federation on real machines: one folder holds its keys, its compose files, its state and its runs.

layout.py            where each file of that folder lies, and who may read it
options.py           the options of `copra-fl deploy init`, kept in that folder
container_files.py   reads what containers write, without following links
certificates.py      the CA, the server's certificate, a key pair for each node
compose.py           the compose files, for any number of clients
compose_command.py   `docker compose` or `podman-compose`, run in that folder
nodes.py             the nodes of a running deployment, listed by Flower's command line
runs.py              submit a run and follow it
superlink.py         the command of the server's container: Flower's SuperLink behind the API gate
api_gate.py          rejects calls from the network to the operator's APIs of the SuperLink
registration.py      registers the nodes' public keys with the SuperLink
hidden_keys.py       keeps private keys from the apps in a container
supernode.py         the command of a client's container: Flower's SuperNode
health.py            the health check of both containers
metrics.py           metrics of the deployment for Prometheus
"""
