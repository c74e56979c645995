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
gated_superlink.py   starts the SuperLink in this process, behind that gate
api_gate.py          rejects calls from the network to the operator's APIs of the SuperLink
node_keys.py         the registered nodes' keys, by which the gate admits requests
operator_secret.py   the secret by which a SuperLink knows its operator
peers.py             the user at the other end of a connection on this machine
clocks.py            rejects nodes whose clocks are wrong
registration.py      registers the nodes' public keys with the SuperLink
hidden_keys.py       keeps private keys from the apps in a container
supernode.py         the command of a client's container: Flower's SuperNode
health.py            the health check of both containers
metrics.py           metrics of the deployment for Prometheus
"""
