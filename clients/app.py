"""The Flower ClientApp of a node; what it does is in `clients.node`.

    query     who are you, which clients can you host
    train     train the cohort from the global adapter, hand back updates
    evaluate  the global adapter on each client's own validation data

It imports nothing large before the first message: in a simulation the server's process imports it too,
and only then starts Ray.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from copra_fl import logs

logs.configure()
app = ClientApp()


@app.query()
def hello(message: Message, context: Context) -> Message:
    from clients import node

    return node.hello(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    from clients import node

    return node.train(message, context)


@app.evaluate()
def evaluate_clients(message: Message, context: Context) -> Message:
    from clients import node

    return node.evaluate_clients(message, context)
