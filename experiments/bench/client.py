"""A ClientApp as Flower's users write it: each node is one client, each message one local training with PEFT.

With `warm = false` every message loads model and data, as in Flower's example of LLM fine-tuning; with `warm = true`
both stay in the actor, and only the adapter is replaced. The training loop is copra_fl/bench/peft_baseline.py.
"""

from functools import lru_cache
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from copra_fl.bench.peft_baseline import Classifier, train
from copra_fl.config import Config, ModelConfig
from copra_fl.data.federated import FederatedData, load_data
from copra_fl.models.build import load_processor
from copra_fl.training.batches import plan_steps
from copra_fl.training.plan import Plan

app = ClientApp()


def open_model(config: ModelConfig, num_labels: int) -> Classifier:
    return Classifier(config, num_labels)


def open_data(config: Config) -> FederatedData:
    return load_data(config, load_processor(config.model))


warm_model = lru_cache(maxsize=1)(open_model)
warm_data = lru_cache(maxsize=4)(open_data)
read_config = lru_cache(maxsize=4)(Config.from_toml)


@app.train()
def train_one_client(message: Message, context: Context) -> Message:
    warm = context.run_config["warm"]
    settings = message.content["config"]
    config = read_config(Path(settings["config"]))
    client = int(context.node_config["partition-id"])
    data = (warm_data if warm else open_data)(config)
    model = (warm_model if warm else open_model)(config.model, len(data.label_names))
    model.write(message.content["arrays"].to_torch_state_dict())
    plan = Plan(settings["server-round"], (client,), config)
    loss = train(model, data, plan_steps(plan, data, client, len(model.layers)), config.training)
    metrics = MetricRecord({"num-examples": len(data.train[client]), "train-loss": loss})
    return Message(RecordDict({"arrays": ArrayRecord(model.read()), "metrics": metrics}), reply_to=message)
