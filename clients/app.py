"""The Flower ClientApp of a node; what it does is in `clients.handlers`.

    query     who are you, which clients can you host
    train     train the cohort from the global adapter, hand back updates
    evaluate  the global adapter on each client's own validation data

It imports nothing large before the first message: in a simulation the server's process imports it too,
and only then starts Ray. Where the node config has `keep-warm` it never does: the node's resident answers.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from copra_fl import logs

logs.configure()
app = ClientApp()


@app.query()
def hello(message: Message, context: Context) -> Message:
    return _answer("hello", message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    return _answer("train", message, context)


@app.evaluate()
def evaluate_clients(message: Message, context: Context) -> Message:
    return _answer("evaluate_clients", message, context)


def _answer(work: str, message: Message, context: Context) -> Message:
    if seconds := float(context.node_config.get("keep-warm", 0)):
        from clients import warm_process

        return Message(warm_process.ask(work, message.content, context, seconds), reply_to=message)

    from clients import handlers

    return Message(getattr(handlers, work)(message.content, context), reply_to=message)
