"""Records of a run: one schema, one JSON form."""

from __future__ import annotations

import json
import math

import pytest

from copra_fl.records import ClientRecord, Evaluation, MissingClient, RecordError, RoundRecord

ROUND = RoundRecord(
    round=1,
    seconds=1.5,
    bytes_down=10,
    bytes_up=20,
    train_loss=math.nan,
    layers=("layer.0", "layer.1"),
    clients=(
        ClientRecord(
            client=3, examples=8, active_steps=(1, 2.5), loss=0.1 + 0.2, steps=4, seconds=0.1, distance=math.inf
        ),
    ),
    missing=(MissingClient(client=5, reason="OSError: disk gone"),),
    notes={"norms": [0.1], "u": None},
    validation=Evaluation.of({"loss": 1.0, "accuracy": 0.5, "examples": 7, "perplexity": 2.7, "datasets": {}}),
)


def test_a_record_survives_json_to_the_last_bit() -> None:
    parsed = RoundRecord.from_json(ROUND.to_json())
    assert parsed.clients == ROUND.clients and parsed.clients[0].loss == 0.1 + 0.2
    assert parsed.train_loss is not None and math.isnan(parsed.train_loss)
    assert parsed.to_json() == ROUND.to_json()


def test_the_json_is_one_line_of_plain_data() -> None:
    line = ROUND.to_json()
    assert "\n" not in line
    plain = json.loads(line)
    assert plain["validation"] == {
        "loss": 1.0, "accuracy": 0.5, "examples": 7, "metrics": {"perplexity": 2.7}, "confusion": [],
        "datasets": {},
    }  # fmt: skip
    assert plain["privacy"] is None and plain["paths"] == []


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"uplink": 3}, "uplink: Extra inputs are not permitted"),
        ({"seconds": "soon"}, "seconds: Input should be a valid number"),
        ({"clients": [{"client": 1}]}, r"clients.0.examples: Field required \(and 5 more\)"),
    ],
)
def test_another_schema_is_refused_with_the_field(changes: dict[str, object], problem: str) -> None:
    other = json.loads(ROUND.to_json()) | changes
    with pytest.raises(RecordError, match=f"^not a RoundRecord of this version of copra-fl, .*: {problem}"):
        RoundRecord.from_json(json.dumps(other))
