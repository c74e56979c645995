"""A node's own examples: one CSV, JSONL or Parquet file of its site, which makes the node one client.

    file  ->  client's train | validation        tokens in the node's cache, readable by its owner only

Nothing of the file leaves the node but the number of examples. What is wrong with it is a `TableError`, whose
outline names settings of the run and counts, never a column, a label or a text of the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from copra_fl.config import Config, DataConfig
from copra_fl.data import (
    CACHE_VERSION,
    FederatedData,
    Stored,
    as_examples,
    cached,
    check_tokenizer,
    codes,
    encode_texts,
    split_client,
    tokenizer_state,
)
from copra_fl.tables import Table, TableError, digest_of, file_table, read_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_own(
    config: Config, tokenizer: PreTrainedTokenizerBase, path: str, client: int, num_clients: int
) -> FederatedData:
    """The examples in the file `path` as those of `client`; all others of the `num_clients` have none here.

    ``labels`` must be known: the server fills it in. Raises TableError for a file that cannot be used, ConfigError as
    `data.load` does.
    """
    data, seed = config.data, config.federation.seed
    assert data.labels, "labels = '' is for the server to resolve"
    check_tokenizer(tokenizer)
    table = file_table("data-path", Path(path))
    columns, size = (data.text_column, data.label_column, data.labels), data.max_length
    digest = digest_of(CACHE_VERSION, "own", table.digest, columns, size, tokenizer_state(tokenizer))
    tokens, facts = cached("tokens", digest, lambda: _tokenise(data, tokenizer, table))
    indices = np.arange(len(tokens["labels"]))
    nobody = [indices[:0]] * num_clients
    train, validation = split_client(indices, client, data.validation_fraction, seed)
    return FederatedData(
        examples=as_examples(tokens, tokenizer),
        label_names=data.label_list,
        client_names=[str(number) for number in range(num_clients)],
        train=[*nobody[:client], train, *nobody[client + 1 :]],
        validation=[*nobody[:client], validation, *nobody[client + 1 :]],
        server_validation=indices[:0],
        test=indices[:0],
        skipped=[],
        unassigned=0,
        dropped_duplicates=0,
        dropped_empty=facts["dropped_empty"],
        digest=digest,
        tokens_digest=digest,
    )


def _tokenise(data: DataConfig, tokenizer: PreTrainedTokenizerBase, table: Table) -> Stored:
    """What the cache keeps of the file."""
    rows, dropped = read_examples(table, {"text-column": data.text_column, "label-column": data.label_column})
    labels = rows["label-column"]
    new = labels[~labels.isin(data.label_list)]
    if len(new):
        told = f"{len(new)} of {len(rows)} examples have a label that is none of {', '.join(data.label_list)}"
        raise TableError(f"{table.where}: {told}: {', '.join(map(repr, new.unique()[:5]))}", told)
    tensors = {"labels": codes(labels, data.label_list)}
    return tensors | encode_texts(tokenizer, rows["text-column"], data.max_length), {"dropped_empty": dropped}
