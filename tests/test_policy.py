"""The policy of a node: every key with a run that it allows and one that it rejects; counts over runs; wrong files."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from clients import audit, handlers
from clients.audit import AuditLog
from clients.node_config import Rejected
from clients.policy import KEYS, Policy
from copra_fl import wire
from copra_fl.aggregation.accounting import Release, epsilon
from copra_fl.config import Config, ModelConfig, toml_value
from copra_fl.models.base_weights import weights_digest
from copra_fl.records import NodeRecord, read_records
from server.errors import FederationError
from tests.support.documents import ROOT
from tests.support.federations import assert_equal, final_adapter, journal
from tests.support.local_grid import LocalGrid, run_federation
from tests.support.tiny import Settings

#: a private run: of 2 rounds with all 6 clients
PRIVATE = {"dp-clip": 1.0, "dp-noise-multiplier": 4.0, "weighting": "equal"}


def write_policy(folder: Path, text: str) -> dict[str, str]:
    """Write a policy and return the node config that names it, with an audit log beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "policy.toml").write_text(text)
    return {"policy-path": str(folder / "policy.toml"), "audit-path": str(folder / "audit")}


def context_of(node_config: Mapping[str, str]) -> Context:
    return Context(1, 100, {"partition-id": 0, "num-partitions": 2, **node_config}, RecordDict(), {})


def greet(flat: Settings, node_config: Mapping[str, str]) -> str:
    """Return the reason for which a node rejects a run at the handshake; empty if it takes part."""
    content = wire.pack_config(Config.from_flat(flat))
    return wire.unpack_handshake(handlers.handshake(content, context_of(node_config))).rejection_reason


class Recorder(LocalGrid):
    """A grid that keeps the first training message."""

    first: RecordDict | None = None

    def answer(self, message: Message) -> Message:
        if message.metadata.message_type == "train" and self.first is None:
            self.first = message.content
        return super().answer(message)


@pytest.fixture(scope="module")
def message(tiny: Settings, tmp_path_factory: pytest.TempPathFactory) -> RecordDict:
    """The first training message of a private run to a node of three clients; it is the largest."""
    grid = Recorder(2)
    run_federation(tiny | PRIVATE | {"num-rounds": 1}, tmp_path_factory.mktemp("run"), grid=grid)
    assert grid.first is not None
    return grid.first


#: key -> a policy that allows the private run, one that does not, and the reason; 6 clients have 74 to 97 examples
CASES = {
    "models": ("models = 'other, {model}'", "models = 'other, minilm'", "model '.*' is not among other, minilm"),
    "models by digest": ("models = '{digest}'", f"models = '{'0' * 64}'", r"\(SHA-256 {digest}\) is not among 0000"),
    "tasks": ("tasks = 'text-classification'", "tasks = 'causal-lm'", "'text-classification' is not among causal-lm"),
    "protection": ("protection = 'private'", None, "dp-clip = 0, but the run must be private"),
    "min-noise-multiplier": ("protection = 'private'\nmin-noise-multiplier = 4.0",
                             "protection = 'private'\nmin-noise-multiplier = 4.1",
                             "dp-noise-multiplier = 4 is below min-noise-multiplier = 4.1"),
    "protection, both": ("protection = 'private+secure'", None, "secure-aggregation = false, but the server must see"),
    "min-colluding-nodes": ("protection = 'private+secure'\nmin-colluding-nodes = 1",
                            "protection = 'private+secure'\nmin-colluding-nodes = 2",
                            "dp-colluding-nodes = 1 is below min-colluding-nodes = 2"),
    "min-secure-threshold": ("protection = 'private+secure'\nmin-secure-threshold = 0.6",
                             "protection = 'private+secure'\nmin-secure-threshold = 0.7",
                             "secure-threshold = 0.666667 is below min-secure-threshold = 0.7"),
    "max-epsilon": ("protection = 'private'\nmax-epsilon = 1.5", "protection = 'private'\nmax-epsilon = 1.3",
                    "the run's epsilon of 1.* at delta = 1e-05 is more than max-epsilon = 1.3"),
    "delta": ("protection = 'private'\nmax-epsilon = 1.3\ndelta = 1e-3",
              "protection = 'private'\nmax-epsilon = 1.5\ndelta = 1e-9", "at delta = 1e-09 is more than"),
    "evaluations": ("evaluations = true", "evaluations = false",
                    r"validation-fraction = 0\.\d+, but the node evaluates nothing"),
    "min-examples": ("min-examples = {smallest}", "min-examples = {above}",
                     "client . has fewer training examples than min-examples"),
    "max-examples-per-round": ("max-examples-per-round = 12", "max-examples-per-round = 11",
                               "client . would train on more examples than max-examples-per-round = 11"),
    "max-rounds": ("max-rounds = 2", "max-rounds = 1", "num-rounds = 2 is more than max-rounds = 1"),
}  # fmt: skip
#: keys that only messages can violate
OF_MESSAGES = {"max-mb-per-round", "max-mb", "min-nodes"}


@pytest.fixture(scope="module")
def names(tiny: Settings, message: RecordDict) -> dict[str, object]:
    """The values in `CASES`."""
    reply = handlers.handshake(wire.pack_config(Config.from_flat(tiny)), context_of({}))
    counts = wire.unpack_handshake(reply).num_examples.values()
    digest = weights_digest(str(tiny["model"]))
    return {"model": tiny["model"], "digest": digest, "smallest": min(counts), "above": min(counts) + 1}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_breaks_the_policy_is_rejected_at_the_handshake_and_with_each_message(
    tiny: Settings, message: RecordDict, names: dict[str, object], case: str, tmp_path: Path
) -> None:
    """The message's configuration is the same, or one that the server has changed since the handshake."""
    allowing, forbidding, reason = CASES[case]
    secure = {"secure-aggregation": True} if "secure" in allowing else {}
    private = tiny | PRIVATE | secure
    broken = private if forbidding else private | {"dp-clip": 0.0, "secure-aggregation": False}
    allowed = write_policy(tmp_path / "allowed", allowing.format(**names))
    forbidden = write_policy(tmp_path / "forbidden", (forbidding or allowing).format(**names))
    reason = f"^client policy: .*{reason.format(**names)}"
    assert greet(private, allowed) == ""
    rejection = greet(broken, forbidden)
    assert re.search(reason, rejection)
    changed = RecordDict({**message, "plan": ConfigRecord({**message["plan"], **broken})})
    with pytest.raises(Rejected, match=reason):
        handlers.train(changed, context_of(forbidden))
    with pytest.raises(Rejected, match=reason):
        handlers.evaluate(changed, context_of(forbidden))
    (first, second, third), _ = read_records(NodeRecord, [tmp_path / "forbidden/audit/audit.jsonl"])
    assert [line.kind for line in (first, second, third)] == ["handshake", "train", "evaluate"]
    assert {line.decision for line in (first, second, third)} == {"rejected"}
    assert first.reason == rejection and second.total_rounds == 0


def test_every_key_has_a_case_and_a_row_in_the_reference() -> None:
    of_plugins = {"plugins"}  # tests/test_plugins.py
    assert KEYS.keys() == {case.split()[0].strip(",") for case in CASES} | OF_MESSAGES | of_plugins
    page = (ROOT / "docs/reference/node-configuration.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w-]+)` \| `(.*?)` \|", page, re.MULTILINE))
    assert {name: rows.get(name) for name in KEYS} == {name: toml_value(key.default) for name, key in KEYS.items()}


def test_a_run_within_every_limit_is_the_run_without_a_policy(
    tiny: Settings, names: dict[str, object], tmp_path: Path
) -> None:
    text = "".join(case[0].format(**names) + "\n" for name, case in CASES.items() if name in ("models", "tasks"))
    text += "min-examples = 1\nmax-examples-per-round = 12\nmax-rounds = 2\nmax-mb-per-round = 1\nmax-mb = 1\n"
    grid = LocalGrid(2, node_configs=[write_policy(tmp_path / "site", text), {}])
    guarded, free = run_federation(tiny, tmp_path / "guarded", grid=grid), run_federation(tiny, tmp_path / "free")
    assert_equal(final_adapter(guarded), final_adapter(free))
    (*_, train, evaluate), num_damaged = read_records(NodeRecord, [tmp_path / "site/audit/audit.jsonl"])
    assert (train.kind, train.round, train.decision, train.total_rounds) == ("train", 2, "accepted", 2)
    row = journal(guarded)[1]
    examples = sum(client["examples"] for client in row["clients"] if client["client"] in train.clients)
    assert len(train.clients) == 3 and train.examples == examples
    assert train.run == evaluate.run and evaluate.total_rounds == 2 and not num_damaged
    assert train.config_digest == evaluate.config_digest != Config.from_flat(tiny).digest, "it is more explicit"
    assert stat.S_IMODE((tmp_path / "site/audit").stat().st_mode) == 0o700


def test_a_node_that_evaluates_nothing_trains_in_a_run_without_validation_examples(
    tiny: Settings, tmp_path: Path
) -> None:
    node = write_policy(tmp_path / "site", "evaluations = false")
    grid = LocalGrid(2, node_configs=[node, {}])
    directory = run_federation(tiny | {"validation-fraction": 0.0}, tmp_path / "run", grid=grid)
    assert len(journal(directory)) == 2
    lines, _ = read_records(NodeRecord, [tmp_path / "site/audit/audit.jsonl"])
    assert [line.kind for line in lines] == ["handshake", "train", "train"]


def test_rounds_of_all_runs_add_up(tiny: Settings, tmp_path: Path) -> None:
    node = write_policy(tmp_path / "site", "max-rounds = 3")
    run_federation(tiny, tmp_path / "first", grid=LocalGrid(2, node_configs=[node, {}]))
    reason = "client policy: the node has trained in max-rounds = 3 rounds"
    with pytest.raises(FederationError, match=reason):
        run_federation(tiny, tmp_path / "second", grid=LocalGrid(2, node_configs=[node, {}]))
    assert len(journal(tmp_path / "second")) == 1, "the third round of the node, and then none"
    with pytest.raises(FederationError, match=rf"node 100 \(partition-id 0\) rejected the run: {reason}"):
        run_federation(tiny, tmp_path / "third", grid=LocalGrid(2, node_configs=[node, {}]))


@pytest.mark.parametrize("end", [{}, {"num-rounds": 3, "target-accuracy": 0.01}], ids=["last round", "early end"])
def test_a_node_that_has_trained_its_last_round_takes_part_in_the_summary(
    tiny: Settings, end: Settings, tmp_path: Path
) -> None:
    """The run is killed between its last round and its summary; another run's round is one too many for the node."""
    node = write_policy(tmp_path / "site", f"max-rounds = {3 if end else 2}")
    if end:
        run_federation(tiny, tmp_path / "earlier", grid=LocalGrid(2, node_configs=[node, {}]))
    directory = run_federation(tiny | end, tmp_path / "run", grid=LocalGrid(2, node_configs=[node, {}]))
    rounds, summary = journal(directory), (directory / "summary.json").read_bytes()
    (directory / "summary.json").unlink()
    run_federation(tiny | end, directory, grid=LocalGrid(2, node_configs=[node, {}]))
    assert journal(directory) == rounds and (directory / "summary.json").read_bytes() == summary
    with pytest.raises(FederationError, match="rejected the run: client policy: the node has trained in max-rounds = "):
        run_federation(tiny | {"num-rounds": 1}, tmp_path / "next", grid=LocalGrid(2, node_configs=[node, {}]))


@pytest.mark.parametrize(
    ("limit", "of_reply", "reason"),
    [
        ("max-mb-per-round", False, "message and reply have more than max-mb-per-round = "),
        ("max-mb-per-round", True, "message and reply have more than max-mb-per-round = "),
        ("max-mb", True, "messages and replies of all runs have more than max-mb = "),
    ],
)
def test_a_message_or_reply_that_is_too_large_is_withheld(
    message: RecordDict, limit: str, of_reply: bool, reason: str, tmp_path: Path
) -> None:
    """One byte less than the message; than message and reply; and just as many, which is allowed."""
    down = wire.num_bytes(message)
    up = wire.num_bytes(handlers.train(message, context_of({})))
    exact = down + up if of_reply else down
    node = write_policy(tmp_path / "site", f"{limit} = {(exact - 1) / 1e6!r}")
    with pytest.raises(Rejected, match=f"client policy: {reason}"):
        handlers.train(message, context_of(node))
    (line,), _ = read_records(NodeRecord, [tmp_path / "site/audit/audit.jsonl"])
    assert (line.bytes_up, line.total_bytes, line.total_rounds) == (0, down, 0), "the reply did not leave"
    if of_reply:
        node = write_policy(tmp_path / "enough", f"{limit} = {exact / 1e6!r}")
        assert "echo" in handlers.train(message, context_of(node))
        (line,), _ = read_records(NodeRecord, [tmp_path / "enough/audit/audit.jsonl"])
        assert (line.bytes_up, line.total_bytes, line.total_rounds) == (up, exact, 1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("max-round = 3", "unknown policy key 'max-round'. Did you mean 'max-rounds'?"),
        ("max-rounds = -1\nmodels = 3", "max-rounds = -1 must be at least 0\nmodels = 3 must be a string"),
        ("protection = 'privat'", "unknown protection 'privat'. Did you mean 'private'?"),
        ("protection = 'private'\nmin-nodes = 3", "min-nodes and min-secure-threshold need protection = 'secure'"),
        ("max-epsilon = 3", "min-noise-multiplier and max-epsilon need protection = 'private'"),
        ("protection = 'private'\nmin-colluding-nodes = 1", "min-colluding-nodes needs protection = 'private+secure'"),
        ("max-rounds = ", "policy-path is not valid TOML"),
        ("\udcff", "byte 0 is 0xff"),
        (None, "cannot read policy-path: No such file or directory"),
    ],
)
def test_a_policy_that_cannot_be_read_rejects_every_run(
    tiny: Settings, message: RecordDict, text: str | None, reason: str, tmp_path: Path
) -> None:
    node = write_policy(tmp_path, "")
    path = Path(node["policy-path"])
    path.unlink() if text is None else path.write_bytes(text.encode(errors="surrogateescape"))
    rejection = greet(tiny, node)
    assert rejection.startswith("client policy: ") and str(tmp_path) not in rejection
    assert reason.replace("\n", " | ") in rejection
    with pytest.raises(Rejected, match=re.escape(reason)):
        handlers.train(message, context_of(node))


def test_an_error_at_the_handshake_is_in_the_audit_log(
    tiny: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_weights(config: ModelConfig) -> str:
        raise OSError("the disk is gone: /data/patients")

    monkeypatch.setattr(handlers, "check_weights", check_weights)
    with pytest.raises(OSError, match="the disk is gone"):
        greet(tiny, {"audit-path": str(tmp_path)})
    (line,), _ = read_records(NodeRecord, [tmp_path / "audit.jsonl"])
    assert (line.kind, line.decision, line.reason) == ("handshake", "failed", "OSError")


def test_counts_need_a_folder(tiny: Settings, tmp_path: Path) -> None:
    node = write_policy(tmp_path, "max-mb = 1")
    del node["audit-path"]
    assert greet(tiny, node).startswith("client policy: max-rounds and max-mb need audit-path in the node config")


def test_either_protection_is_enough() -> None:
    policy = Policy(protection="private, secure")
    policy.check_run(Config.from_flat({"secure-aggregation": True}), "minilm", 2)
    policy.check_run(Config.from_flat(PRIVATE), "minilm", 2)
    with pytest.raises(Rejected, match="must be private.*; secure-aggregation = false, but the server must see sums"):
        policy.check_run(Config(), "minilm", 2)


def test_epsilon_is_that_of_the_sampling_in_the_configuration() -> None:
    """3 of 6 clients a round; the privacy budget of the server computes the same from its own count of clients."""
    sampled = Config.from_flat(PRIVATE | {"clients-per-round": 3, "num-rounds": 2})
    expected = epsilon([Release(0.5, 4.0)] * 2, 1e-5)
    assert 0.5 < expected < 1.0
    Policy(protection="private", max_epsilon=expected + 1e-9).check_run(sampled, "minilm", 6)
    with pytest.raises(Rejected, match=f"epsilon of {expected:.3f} at"):
        Policy(protection="private", max_epsilon=expected - 1e-3).check_run(sampled, "minilm", 6)


def test_epsilon_is_that_of_the_fewest_clients_that_a_tolerant_run_starts_with() -> None:
    """3 of as few as 4 of 6 clients a round: a client is in 3/4 of the rounds, not in half of them."""
    tolerant = Config.from_flat(
        PRIVATE | {"clients-per-round": 3, "num-rounds": 2, "failures": "tolerant", "min-nodes": 4}
    )
    expected = epsilon([Release(0.75, 4.0)] * 2, 1e-5)
    Policy(protection="private", max_epsilon=expected + 1e-9).check_run(tolerant, "minilm", 6)
    with pytest.raises(Rejected, match=f"epsilon of {expected:.3f} .* with each client in up to 0.75 of the rounds"):
        Policy(protection="private", max_epsilon=expected - 1e-3).check_run(tolerant, "minilm", 6)


def test_towards_the_server_sampling_does_not_count_and_both_protections_are_needed() -> None:
    both = PRIVATE | {"secure-aggregation": True, "clients-per-round": 3, "num-rounds": 2}
    expected = epsilon([Release(1.0, 4.0)] * 2, 1e-5)
    policy = Policy(protection="private+secure", max_epsilon=expected + 1e-9, min_noise_multiplier=4.0)
    policy.check_run(Config.from_flat(both), "minilm", 6)
    for changes, reason in (
        ({"num-rounds": 3}, "the run's epsilon of .* is more than max-epsilon"),
        ({"dp-noise-multiplier": 3.9}, "dp-noise-multiplier = 3.9 is below min-noise-multiplier = 4"),
        ({"dp-clip": 0.0, "weighting": "examples"}, "dp-clip = 0, but the run must be private"),
        ({"secure-aggregation": False}, "secure-aggregation = false, but the server must see sums only"),
    ):
        with pytest.raises(Rejected, match=reason):
            policy.check_run(Config.from_flat(both | changes), "minilm", 6)


def line_of(number: int) -> NodeRecord:
    return NodeRecord(time="t", kind="train", flower_run=1, config_digest="c", round=number, bytes_down=10)


def test_the_log_is_bounded_and_its_totals_survive_rotation_and_torn_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "MAX_BYTES", 1000)
    log = AuditLog(str(tmp_path))
    for number in range(1, 51):
        log.append(line_of(number))
        if number % 7 == 0:
            with (tmp_path / "audit.jsonl").open("a") as file:
                file.write('{"time": "half a li')
    files = sorted(tmp_path.glob("audit*.jsonl"))
    assert len(files) == 5 and sum(path.stat().st_size for path in files) < 5 * 1500
    oldest_first = [*(tmp_path / f"audit.{number}.jsonl" for number in (4, 3, 2, 1)), tmp_path / "audit.jsonl"]
    records, num_damaged = read_records(NodeRecord, oldest_first)
    rounds = [record.round for record in records]
    assert rounds == list(range(rounds[0], 51)) and rounds[0] > 10 and num_damaged > 1
    assert all(record.total_rounds == record.round for record in records) and records[-1].total_bytes == 500
    (tmp_path / "audit.jsonl").write_text('{"time": "half a li')
    (*_, last), _ = read_records(NodeRecord, [tmp_path / "audit.1.jsonl"])
    assert log.counted(line_of(0)).total_rounds == last.total_rounds + 1, "the newest whole line, in an older file"
