"""A training script of Transformers' Trainer that federates it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: The texts are encoded as the task causal-lm does: BOS, text, EOS. `rates.txt` gets the learning rate of each step.
SCRIPT = """
import os
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import copra_fl

tokenizer = AutoTokenizer.from_pretrained({model!r})
lora = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=16, target_modules=["q_proj", "v_proj"], use_dora={dora})
model = get_peft_model(AutoModelForCausalLM.from_pretrained({model!r}, dtype="float32"), lora)
rows = copra_fl.client_data(Dataset.from_pandas(pd.read_csv(os.environ["ROWS"])) if "ROWS" in os.environ else None)


def collate(rows):
    texts = [torch.tensor(tokenizer.encode("<s>" + row["text"] + "</s>", add_special_tokens=False)) for row in rows]
    pad = lambda value: torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=value)
    labels = pad(-100)
    labels[:, 0] = -100
    return {{"input_ids": pad(2), "attention_mask": (pad(-1) >= 0).long(), "labels": labels}}


class Rates(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        with Path("rates.txt").open("a") as file:
            print(kwargs["lr_scheduler"].get_last_lr()[0], file=file)


seed = int(os.environ.get("SEED", 0))
args = TrainingArguments({output!r}, per_device_train_batch_size=4, learning_rate=0.002, remove_unused_columns=False,
                         max_steps=3, seed=seed, data_seed=seed, report_to="none", disable_tqdm=True, use_cpu=True,
                         save_strategy="no", **{arguments!r})
trainer = Trainer(model, args, train_dataset=rows, data_collator=collate, callbacks=[Rates()])
copra_fl.federate(trainer)
trainer.train()
"""


def write_script(folder: Path, model: str, arguments: dict[str, Any], dora: bool = False) -> str:
    """Write `folder`/script.py, which trains `model` with further `arguments` of the Trainer; return its path."""
    path = folder / "script.py"
    path.write_text(SCRIPT.format(model=model, output=str(folder / "output"), arguments=arguments, dora=dora))
    return str(path)
