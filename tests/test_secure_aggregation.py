"""Secure aggregation without a transport: sums, nodes that drop out, lies and damage, and what a vector shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from scipy import stats

from copra_fl.secure_aggregation import node, server, shamir
from copra_fl.secure_aggregation.errors import SecureAggregationError
from copra_fl.secure_aggregation.fixed_point import LARGEST, decode, encode, largest_error, scale_for
from copra_fl.secure_aggregation.keys import agree, bind, new_identity, new_secret, public_identity, public_of, seal
from copra_fl.secure_aggregation.masks import add_pairwise, mask
from copra_fl.secure_aggregation.messages import Keys, Revealed, SealedShares
from copra_fl.secure_aggregation.neighbours import degree, neighbours, threshold_of
from tests.support.secure import INPUTS, SecureRound, plain_sum, random_vectors

# ---------------------------------------------------------------- parts


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 100])
@pytest.mark.parametrize("bound", [1e-3, 1.0, 3.7, 1e6])
def test_the_sum_of_codes_is_the_sum_of_values_up_to_half_a_unit_a_node(num_nodes: int, bound: float) -> None:
    scale = scale_for(bound, num_nodes)
    values = np.random.default_rng(1).uniform(-bound, bound, (num_nodes, 30))
    values[:, :2] = bound, -bound  # all nodes at the edge of the range
    total = np.sum([encode(row, scale, num_nodes) for row in values], axis=0, dtype=np.uint64)
    exact = [float(sum(map(Fraction, column))) for column in values.T.tolist()]
    limit = largest_error(scale, num_nodes) + 2**-52 * num_nodes * bound  # of reading the total as a float64
    assert np.abs(decode(total, scale) - exact).max() <= limit
    assert bound * scale * num_nodes <= LARGEST < 4.01 * bound * scale * num_nodes, "the largest power of two"


@pytest.mark.parametrize("value", [1.01, -1.01, float("nan"), float("inf"), -1e300])
def test_a_value_that_does_not_fit_is_refused_and_not_cut(value: float) -> None:
    with pytest.raises(SecureAggregationError, match="does not fit: with 3 nodes"):
        encode(np.array([0.0, value]), LARGEST / 3, 3)


def test_any_threshold_of_shares_rebuilds_a_secret_and_fewer_fit_every_secret() -> None:
    secret = bytes(range(32))
    shares = shamir.split(secret, [0, 3, 4, 9, 200], 3)
    assert all(shamir.combine(dict(chosen)) == secret for chosen in combinations(shares.items(), 3))
    assert shamir.combine(shares) == secret
    # by hand: the line through two shares and any other secret passes through a possible third share
    (x1, y1), (x2, y2) = [(holder + 1, int.from_bytes(shares[holder], "big")) for holder in (0, 3)]
    other, p, x3 = 12345, shamir.PRIME, 5
    lagrange = [
        (other, x1 * x2, [(x3 - x1) * (x3 - x2)]),
        (y1, x1 * (x1 - x2), [x3 * (x3 - x2)]),
        (y2, x2 * (x2 - x1), [x3 * (x3 - x1)]),
    ]
    third = sum(y * numerator[0] * pow(denominator, -1, p) for y, denominator, numerator in lagrange) % p
    forged = {0: shares[0], 3: shares[3], 4: third.to_bytes(shamir.SHARE_BYTES, "big")}
    assert shamir.combine(forged) == other.to_bytes(32, "big")


def test_the_field_of_shares_is_a_prime_above_all_secrets() -> None:
    from Crypto.Util.number import isPrime

    assert isPrime(shamir.PRIME) and 2**256 < shamir.PRIME < 2 ** (8 * shamir.SHARE_BYTES)


def test_two_nodes_agree_on_a_key_for_each_purpose_and_their_masks_cancel() -> None:
    a, b = new_secret(), new_secret()
    key = agree(a, public_of(b), b"purpose")
    assert key == agree(b, public_of(a), b"purpose") != agree(a, public_of(b), b"another")
    vectors = [np.zeros(7, dtype=np.uint64) for _ in range(2)]
    add_pairwise(vectors[0], key, 4, 9)
    add_pairwise(vectors[1], key, 9, 4)
    assert vectors[0].any() and not (vectors[0] + vectors[1]).any()
    with pytest.raises(SecureAggregationError, match="not a valid X25519 key"):
        agree(a, bytes(32), b"purpose")  # of small order: the same secret for everybody


def test_masks_are_the_keystream_of_rfc_8439() -> None:
    """Appendix A.1, test vector 1: zero key, zero nonce, counter 0."""
    expected = "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    assert mask(bytes(32), 4).astype("<u8").tobytes().hex() == expected


def test_bound_texts_have_one_reading() -> None:
    assert len({bind("ab", "c"), bind("a", "bc"), bind("abc"), bind("abc", ""), bind(b"abc", 1)}) == 5


@pytest.mark.parametrize("num_nodes", [2, 15, 16, 17, 33, 128, 200])
def test_the_graph_is_regular_and_its_thresholds_hold(num_nodes: int) -> None:
    k = degree(num_nodes, 2 / 3)
    graph = neighbours(range(100, 100 + num_nodes), k)
    assert all(len(set(near)) == k and one not in near for one, near in graph.items())
    assert all(one in graph[other] for one, near in graph.items() for other in near)
    holders = k + 1
    assert 2 * threshold_of(2 / 3, holders) > holders, "two disjoint groups cannot get both secrets"
    assert (k == num_nodes - 1) == (num_nodes < 16)
    corrupt = num_nodes // 5
    if num_nodes >= 16:
        # simulated: the chance is below 2^-40, so it must never happen
        rng, enough = np.random.default_rng(0), 2 * threshold_of(2 / 3, holders) - holders
        assert rng.hypergeometric(corrupt, num_nodes - 1 - corrupt, k, 200_000).max() < enough


# ---------------------------------------------------------------- sums

DROPS: list[tuple[int, dict[int, list[int]], list[int]]] = [
    (2, {}, [0, 1]),
    (5, {}, [0, 1, 2, 3, 4]),
    (5, {1: [0]}, [1, 2, 3, 4]),
    (5, {2: [1]}, [0, 2, 3, 4]),
    (5, {3: [2]}, [0, 1, 3, 4]),
    (5, {4: [3]}, [0, 1, 2, 3, 4]),
    (5, {5: [3]}, [0, 1, 2, 3, 4]),
    (5, {4: [3], 5: [2]}, [0, 1, 2, 3, 4]),
    (7, {2: [0], 3: [6]}, [1, 2, 3, 4, 5]),
    (7, {1: [0], 5: [3]}, [1, 2, 3, 4, 5, 6]),
    (8, {3: [1], 5: [2]}, [0, 2, 3, 4, 5, 6, 7]),
    (17, {2: [16], 3: [0], 5: [9]}, list(range(1, 16))),  # 5 of the 15 holders of a secret can be missing
]


@pytest.mark.parametrize(("num_nodes", "drops", "summed"), DROPS)
def test_the_unmasked_sum_is_that_of_the_nodes_that_sent_a_vector(
    num_nodes: int, drops: dict[int, list[int]], summed: list[int]
) -> None:
    vectors = random_vectors(num_nodes)
    total, nodes = SecureRound(num_nodes, drops).total(vectors)
    assert nodes == summed
    assert (total == plain_sum(vectors, summed)).all()


@pytest.mark.parametrize(
    ("drops", "reason"),
    [
        ({1: [0, 1, 2, 3]}, "1 node takes part; secure aggregation needs at least 2"),
        ({2: [0, 1]}, "3 of 5 nodes have sent shares; secure-threshold = 0.666667 needs 4"),
        ({3: [0, 1]}, "3 of 5 nodes have sent a vector; .* needs 4"),
        ({4: [0, 1]}, "3 of 5 nodes have signed the list of survivors; below 4 node 0 reveals nothing"),
        ({5: [0, 1]}, "3 shares of the seed of node 0 have been revealed; 4 are needed"),
        ({2: [0], 3: [1]}, "3 of 5 nodes have sent a vector"),
    ],
)
def test_below_the_threshold_a_round_fails_by_name(drops: dict[int, list[int]], reason: str) -> None:
    with pytest.raises(SecureAggregationError, match=reason):
        SecureRound(5, drops).total(random_vectors(5))


# ---------------------------------------------------------------- what a server sees


def test_masked_vectors_are_uniform_and_nothing_plain_reaches_the_server() -> None:
    """A vector of one constant: its masked bits, bytes and their order pass chi-squared tests."""
    size = 20_000
    vectors = {number: np.full(size, 7, dtype=np.uint64) for number in range(3)}
    round_ = SecureRound(3, {3: [2]}, share=0.6)
    round_.total(vectors)
    masked = [np.frombuffer(text, dtype=np.uint64) for text in round_.received if len(text) == 8 * size]
    assert len(masked) == 2
    for vector in masked:
        counts = np.bincount(np.frombuffer(vector.tobytes(), dtype=np.uint8), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-6
        bits = np.unpackbits(vector.view(np.uint8)).reshape(size, 64).sum(0)
        assert np.abs(bits - size / 2).max() < 6 * np.sqrt(size / 4), "no bit of 64 is on too often"
        assert abs(stats.spearmanr(vector[:-1], vector[1:]).statistic) < 6 / np.sqrt(size)
    # two nodes with the same vector: nothing of one tells the other
    assert abs(stats.spearmanr(*masked).statistic) < 6 / np.sqrt(size)
    assert not any(vectors[0][:2].tobytes() in text for text in round_.received)


def test_a_node_reveals_nothing_if_most_of_its_neighbours_are_said_to_be_gone() -> None:
    """More nodes survive than the threshold, but they are far from node 0 on the ring."""
    round_ = SecureRound(16)
    relay = round_.split(server.list_nodes("run", 1, 2 / 3, round_.offer()))
    masked = round_.send(relay, random_vectors(16))
    gone = relay.roster.neighbours[0][:5]
    survivors = masked.keys() - set(gone)
    assert len(survivors) >= relay.roster.min_nodes
    with pytest.raises(
        SecureAggregationError, match="8 of the neighbours of node 0 are listed as survivors, .* below 9"
    ):
        node.confirm(round_.sessions[0], survivors, round_.identities[0])


@pytest.mark.parametrize(("num_nodes", "num_colluding"), [(3, 0), (4, 1), (6, 1), (10, 3)])
def test_a_server_that_keeps_shares_back_gets_no_signature_and_no_share(num_nodes: int, num_colluding: int) -> None:
    """Node 0 gets shares of nodes that the server will call gone, and of its own: it could remove all their masks."""
    round_ = SecureRound(num_nodes)
    relay = round_.split(server.list_nodes("run", 1, 2 / 3, round_.offer()))
    survivors = list(range(relay.roster.min_nodes))
    known = {*range(num_nodes)} - {*survivors[: len(survivors) - num_colluding]}

    def kept_back(messages: list[SealedShares]) -> list[SealedShares]:
        return [message for message in messages if message.receiver != 0 or message.sender in known]

    round_.send(relay, random_vectors(num_nodes), kept_back)
    match = r"the survivors \[1.*\] share no mask with node 0"
    with pytest.raises(SecureAggregationError, match=match):
        node.confirm(round_.sessions[0], survivors, round_.identities[0])
    with pytest.raises(SecureAggregationError, match=match):
        node.reveal(round_.sessions[0], survivors, {})


def test_the_vectors_of_nodes_with_other_inputs_have_no_sum() -> None:
    """A server tells nodes 1 and 2 to compute vectors that it knows, to read that of node 0; or node 3 has gone."""
    round_, vectors = SecureRound(4, {3: [3]}), random_vectors(4)
    relay = round_.split(server.list_nodes("run", 1, 2 / 3, round_.offer()))
    masked = {}
    for number, inputs in ((0, b"adapter"), (1, b"another"), (2, b"another")):
        session = node.receive_shares(round_.sessions[number], relay.for_receiver(number))
        round_.sessions[number], masked[number] = node.mask_vector(session, vectors[number], inputs)
    revealed, _ = round_.reveal(relay, masked.keys())
    for inputs in (b"adapter", b"another"):
        total = relay.unmask(masked, revealed, inputs)
        assert not (total == plain_sum(vectors, [0, 1, 2])).any()


def test_the_same_vector_is_masked_anew_in_each_round() -> None:
    vectors = random_vectors(3)
    rounds = [SecureRound(3) for _ in range(2)]
    totals = [round_.total(vectors)[0] for round_ in rounds]
    assert (totals[0] == totals[1]).all()
    assert set(rounds[0].received) & set(rounds[1].received) == {b""}, "a node sends itself nothing"


def test_no_node_reveals_both_secrets_of_a_peer() -> None:
    round_ = SecureRound(6, {3: [5]})
    relay = round_.split(server.list_nodes("run", 1, 2 / 3, round_.offer()))
    masked = round_.send(relay, random_vectors(6))
    signatures = round_.confirm(masked.keys())
    for number in masked:
        revealed = node.reveal(round_.sessions[number], masked.keys(), signatures)
        assert (set(revealed.seeds), set(revealed.keys)) == ({0, 1, 2, 3, 4}, {5})
    with pytest.raises(
        SecureAggregationError, match="3 of 6 nodes are listed as survivors; below 4 node 0 reveals not"
    ):
        node.reveal(round_.sessions[0], [0, 1, 2], signatures)
    with pytest.raises(SecureAggregationError, match="has not sent a vector to this sum"):
        node.reveal(round_.sessions[0], [1, 2, 3, 4, 5], signatures)
    with pytest.raises(SecureAggregationError, match=r"survivors \[9\] are not in the list"):
        node.reveal(round_.sessions[0], [0, 1, 2, 3, 9], signatures)
    with pytest.raises(SecureAggregationError, match="node 5 is asked to reveal shares, but has not sent a vector"):
        node.reveal(round_.sessions[5], range(6), signatures)
    with pytest.raises(SecureAggregationError, match="has sent its vector of this round already"):
        node.mask_vector(round_.sessions[0], random_vectors(1)[0], INPUTS)


def test_a_server_that_tells_nodes_different_survivors_gets_no_second_sum() -> None:
    """Nodes 0 and 1 are said to be gone to two nodes each, so that shares of theirs and of the others' keys add up.

    With any lists that 4 of 6 nodes each are on, nobody reveals shares unless 4 nodes have signed the same list, and
    two lists would need two signatures of at least 2 nodes. Each node signs once.
    """
    round_ = SecureRound(6)
    relay = round_.split(server.list_nodes("run", 1, 2 / 3, round_.offer()))
    masked = round_.send(relay, random_vectors(6))
    lists = {0: [0, 2, 3, 4, 5], 1: [1, 2, 3, 4, 5], 2: [0, 2, 3, 4, 5], 3: [1, 2, 3, 4, 5], 4: [0, 1, 4, 5, 2, 3],
             5: [0, 1, 2, 3, 4, 5]}  # fmt: skip
    told = {tuple(sorted(survivors)): dict[int, bytes]() for survivors in lists.values()}
    for number, survivors in lists.items():
        session, answer = node.confirm(round_.sessions[number], survivors, round_.identities[number])
        round_.sessions[number] = session
        told[tuple(sorted(survivors))][number] = answer.signature
        with pytest.raises(SecureAggregationError, match=f"node {number} has signed a list of survivors of this round"):
            node.confirm(session, masked.keys(), round_.identities[number])
    assert sorted(map(len, told.values())) == [2, 2, 2]
    everything = {number: signature for signatures in told.values() for number, signature in signatures.items()}
    for survivors, signatures in told.items():
        for number in survivors:
            with pytest.raises(SecureAggregationError, match="2 of 6 nodes have signed the list of survivors; below 4"):
                node.reveal(round_.sessions[number], survivors, signatures)
            others = {signer: signature for signer, signature in everything.items() if signer in survivors}
            with pytest.raises(SecureAggregationError, match=r"not signed by node \d: the server has told it another"):
                node.reveal(round_.sessions[number], survivors, others)
    with pytest.raises(SecureAggregationError, match=r"nodes \[0\] have signed the list .* but are not on it"):
        node.reveal(round_.sessions[5], [1, 2, 3, 4, 5], everything)


@pytest.mark.parametrize("share", [0.501, 2 / 3, 1.0])
def test_two_lists_of_survivors_cannot_both_be_signed(share: float) -> None:
    """Each needs the threshold of distinct nodes, which is more than half of them; likewise the shares of a secret."""
    for num_nodes in range(2, 40):
        holders = degree(num_nodes, share) + 1
        assert 2 * threshold_of(share, num_nodes) > num_nodes and 2 * threshold_of(share, holders) > holders


# ---------------------------------------------------------------- lies and damage


def flipped(text: bytes) -> bytes:
    return bytes([text[0] ^ 1]) + text[1:]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda keys: replace(keys, mask_key=flipped(keys.mask_key)), "keys of node 1 are not signed by it for round"),
        (lambda keys: replace(keys, share_key=flipped(keys.share_key)), "keys of node 1 are not signed by it"),
        (lambda keys: replace(keys, commitment=flipped(keys.commitment)), "keys of node 1 are not signed by it"),
        (lambda keys: replace(keys, signature=flipped(keys.signature)), "keys of node 1 are not signed by it"),
        (lambda keys: replace(keys, mask_key=b"short"), "node 1 sends keys of a wrong length"),
        (
            lambda keys: node.offer_keys("run", 1, 1, new_identity())[1],
            "node 1 signs with another key than the registered one",
        ),
        (lambda keys: replace(keys, node=7), "node 7 is not registered"),
    ],
)
def test_a_list_with_changed_keys_is_refused_by_name(change: Callable[[Keys], Keys], reason: str) -> None:
    round_ = SecureRound(3)
    first, second, third = round_.offer()
    roster = server.list_nodes("run", 1, 2 / 3, [first, change(second), third])
    with pytest.raises(SecureAggregationError, match=reason):
        round_.split(roster)


def test_a_list_of_another_round_run_or_with_a_node_twice_is_refused() -> None:
    round_ = SecureRound(3)
    keys = round_.offer()
    for run, number in (("other", 1), ("run", 2)):
        with pytest.raises(SecureAggregationError, match=f"is of round {number} of run {run}, not of round 1 of run"):
            node.share_secrets(round_.secrets[0], server.list_nodes(run, number, 2 / 3, keys))
    old = round_.offer()  # the secrets of the nodes are new now, so the first keys are a replay
    with pytest.raises(SecureAggregationError, match="does not have the keys that node 0 has made"):
        node.share_secrets(round_.secrets[0], server.list_nodes("run", 1, 2 / 3, keys))
    with pytest.raises(SecureAggregationError, match="has the node of node 2 twice"):
        server.list_nodes("run", 1, 2 / 3, [*old, old[2]])
    with pytest.raises(SecureAggregationError, match="has the mask key of node 2 twice"):
        server.list_nodes("run", 1, 2 / 3, [*old, replace(old[2], node=3)])
    with pytest.raises(SecureAggregationError, match="secure-threshold = 0.5 must be more than 0.5"):
        server.list_nodes("run", 1, 0.5, old)
    with pytest.raises(SecureAggregationError, match="1 node takes part"):
        server.list_nodes("run", 1, 2 / 3, old[:1])
    replayed = replace(server.list_nodes("run", 1, 2 / 3, old), keys=(*old[:2], keys[2]))
    session, _ = node.share_secrets(round_.secrets[0], replayed)  # signed for this round, but of no use: see below
    assert session.roster.context != server.list_nodes("run", 1, 2 / 3, old).context


def test_shares_for_another_list_of_nodes_do_not_open() -> None:
    """A server shows one node another list: an old key of node 2 in place of the new one."""
    round_ = SecureRound(3)
    old, new = round_.offer(), round_.offer()
    honest = round_.split(server.list_nodes("run", 1, 2 / 3, new))
    other = server.list_nodes("run", 1, 2 / 3, [*new[:2], old[2]])
    session, _ = node.share_secrets(round_.secrets[0], other, round_.trusted)
    reason = "shares that node 1 has sent to node 0 do not open: .* another run, round or list of nodes"
    with pytest.raises(SecureAggregationError, match=reason):
        node.receive_shares(session, honest.for_receiver(0))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda one: replace(one, sealed=flipped(one.sealed)), "node 1 has sent to node 0 do not open"),
        (lambda one: replace(one, sealed=b""), "node 1 has sent to node 0 do not open"),
        (lambda one: replace(one, seed_digest=flipped(one.seed_digest)), "not those that it has announced"),
        (lambda one: replace(one, key_digest=flipped(one.key_digest)), "not those that it has announced"),
        (lambda one: replace(one, receiver=2), "node 1 has sent to node 0 are not expected"),
        (lambda one: replace(one, sender=2), "node 2 has sent to node 0 do not open"),
    ],
)
def test_changed_shares_are_refused_by_name(change: Callable[[SealedShares], SealedShares], reason: str) -> None:
    round_ = SecureRound(4)
    relay = round_.split(server.list_nodes("run", 1, 2 / 3, round_.offer()))
    with pytest.raises(SecureAggregationError, match=reason):
        round_.send(relay, random_vectors(4), lambda messages: [change(messages[0]), *messages[1:]])
    with pytest.raises(SecureAggregationError, match="shares that node 1 has sent to node 0 are not expected"):
        node.receive_shares(round_.sessions[0], 2 * relay.for_receiver(0)[:1])
    with pytest.raises(SecureAggregationError, match="node 0 has shares of 2 nodes, its own among them; 3 are needed"):
        node.receive_shares(round_.sessions[0], relay.for_receiver(0)[:1])


def test_a_wrong_share_is_refused_by_name_and_the_others_are_enough() -> None:
    vectors = random_vectors(6)
    for field in ("seeds", "keys"):
        round_ = SecureRound(6, {3: [5]})
        relay = round_.split(server.list_nodes("run", 1, 2 / 3, round_.offer()))
        masked = round_.send(relay, vectors)

        def lie(revealed: Revealed, field: str = field) -> Revealed:
            shares = getattr(revealed, field)
            changed: dict[str, Any] = {field: {owner: flipped(share) for owner, share in shares.items()}}
            return replace(revealed, **changed) if revealed.node == 2 else revealed

        right, reasons = round_.reveal(relay, masked.keys(), lie)
        assert reasons == [f"node 2 has revealed a wrong share of the {field[:-1]} of node {5 * (field == 'keys')}"]
        assert (relay.unmask(masked, right, INPUTS) == plain_sum(vectors, [0, 1, 2, 3, 4])).all()
        assert relay.can_unmask([0, 1, 2, 3]) and not relay.can_unmask([0, 1, 2])
    incomplete = replace(right[0], keys={})
    assert (
        relay.wrong_shares(incomplete, masked.keys()) == "node 0 has not revealed one share of each of its neighbours"
    )


def test_a_node_that_shares_another_secret_than_announced_is_named() -> None:
    for secret, drops in (("seed", {}), ("mask_key", {3: [0]})):
        round_ = SecureRound(4, drops)
        roster = server.list_nodes("run", 1, 2 / 3, round_.offer())
        if secret == "seed":
            round_.secrets[0] = replace(round_.secrets[0], seed=new_secret())
            relay = round_.split(roster)
        else:  # the list is checked with the right key, the shares are of another
            relay = round_.split(roster)
            session, messages = round_.sessions[0], relay.shares[0]
            wrong = shamir.split(new_secret(), roster.holders(0), roster.threshold(0))
            changed = {}
            for holder in messages:
                seed = b"\0" * shamir.SHARE_BYTES
                info = node.seal_info(roster, 0, holder)
                key = agree(session.secrets.share_key, roster.by_node[holder].share_key, info)
                digests = node.digests_of(roster, 0, holder, seed, wrong[holder])
                changed[holder] = SealedShares(0, holder, seal(key, seed + wrong[holder], roster.context), *digests)
            relay = replace(relay, shares={**relay.shares, 0: changed})
        masked = round_.send(relay, random_vectors(4))
        right, _ = round_.reveal(relay, masked.keys())
        kind = "seed" if secret == "seed" else "key"
        with pytest.raises(SecureAggregationError, match=f"node 0 has shared another {kind} than the one it has anno"):
            relay.unmask(masked, right, INPUTS)


def test_a_node_must_share_with_each_of_its_neighbours() -> None:
    round_ = SecureRound(3)
    roster = server.list_nodes("run", 1, 2 / 3, round_.offer())
    _, messages = node.share_secrets(round_.secrets[0], roster)
    server.check_shares(roster, 0, messages)
    for wrong in (messages[:2], [*messages, messages[0]], [*messages[:2], replace(messages[2], sender=1)]):
        with pytest.raises(SecureAggregationError, match="node 0 has not sent one share to each of its neighbours"):
            server.check_shares(roster, 0, wrong)


def test_secrets_are_not_in_the_text_of_a_state() -> None:
    """A traceback or a log line may quote it."""
    round_ = SecureRound(2)
    round_.split(server.list_nodes("run", 1, 2 / 3, round_.offer()))
    text = repr(round_.sessions[0])
    assert str(round_.secrets[0].seed) not in text and str(round_.secrets[0].mask_key) not in text
    assert str(public_identity(round_.identities[0])) in text
