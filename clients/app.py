"""The Flower ClientApp of a node; `clients.handlers` does the work.

    query     handshake: describe the node and the clients that it can host
    train     train the cohort from the global adapter and return its updates
    evaluate  evaluate the global adapter on each client's own validation data

With secure aggregation (`clients.secure_handlers`) also, around the training:

    query.keys      sign fresh public keys
    query.shares    share the secrets behind them among the neighbours
    query.unmask    reveal shares, so that the masks can be removed from the sum

Nothing large is imported before the first message: in a simulation the server's process imports this module too, and
starts Ray only afterwards. If the node config has `warm-process`, this process imports nothing large at all: the node's
warm process answers. If there can be none, this process does.
"""

from __future__ import annotations

from logging import WARNING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.supercore.logger import log

from copra_fl import logs

logs.configure()
app = ClientApp()


@app.query()
def handshake(message: Message, context: Context) -> Message:
    return _answer("handshake", message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    return _answer("train", message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return _answer("evaluate", message, context)


@app.query("keys")
def keys(message: Message, context: Context) -> Message:
    return _answer("keys", message, context)


@app.query("shares")
def shares(message: Message, context: Context) -> Message:
    return _answer("shares", message, context)


@app.query("unmask")
def unmask(message: Message, context: Context) -> Message:
    return _answer("unmask", message, context)


def _answer(handler: str, message: Message, context: Context) -> Message:
    if idle_seconds := float(context.node_config.get("warm-process", 0)):
        from clients import warm_process

        try:
            return Message(warm_process.request(handler, message.content, context, idle_seconds), reply_to=message)
        except warm_process.NoWarmProcess as error:
            log(WARNING, "%s is handled without a warm process: %s", handler, error)

    from clients.handlers import HANDLERS

    return Message(HANDLERS[handler](message.content, context), reply_to=message)
