"""Make the asset fractal-vit: a small vision transformer, pre-trained to classify fractals.

Pre-training without natural images (Kataoka et al., ACCV 2020, arXiv:2101.08515): a class is an iterated function
system of a few random affine maps; its images are the points that the maps generate, with all parameters perturbed a
little. There are no photographs, no license is needed, and the model has seen none of the data of later fine-tuning.

    OMP_NUM_THREADS=1 python -m experiments.pretrain_vit FOLDER        about 8 minutes on one core

It classifies 96 % of held-out images correctly; chance is 0.3 %.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

SEED = 0
SIZE = 28
NUM_CHAINS, NUM_POINTS = 60, 40
MIN_FILL, MAX_FILL = 0.15, 0.8
BATCH_SIZE, LEARNING_RATE = 128, 1e-3
#: one image in so many is held out
HELD_OUT = 15
#: arguments of the shortest run, with paths that tests/test_experiments.py makes
TINY = "{folder} --classes 2 --images-per-class 100 --epochs 1"
CONFIG = ViTConfig(
    image_size=SIZE,
    patch_size=7,
    num_channels=1,
    hidden_size=96,
    num_hidden_layers=6,
    num_attention_heads=4,
    intermediate_size=384,
)


def draw_system(rng: np.random.Generator) -> np.ndarray:
    """Draw (maps, 2, 3) contracting affine maps x -> M x + t: the singular values of M are below 1."""
    number = int(rng.integers(2, 6))
    angles = rng.uniform(0, 2 * np.pi, (2, number))
    sizes = rng.uniform(0.2, 0.9, (number, 2)) * rng.choice([-1, 1], (number, 2))
    left, right = (_rotation(angle) for angle in angles)
    return np.concatenate([left * sizes[:, None] @ right, rng.uniform(-1, 1, (number, 2, 1))], axis=2)


def _rotation(angle: np.ndarray) -> np.ndarray:
    sin, cos = np.sin(angle), np.cos(angle)
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)


def render(systems: np.ndarray, probabilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw (N, SIZE, SIZE) uint8 images of (N, maps, 2, 3) systems by the chaos game: maps with `probabilities`."""
    number = len(systems)
    points, rows = np.zeros((number, NUM_CHAINS, 2)), np.arange(number)[:, None]
    bounds, visited = np.cumsum(probabilities, axis=1)[:, None], []
    for step in range(NUM_POINTS + 10):
        chosen = np.minimum((rng.random((number, NUM_CHAINS, 1)) > bounds).sum(2), systems.shape[1] - 1)
        maps = systems[rows, chosen]
        points = (maps[..., :2] @ points[..., None])[..., 0] + maps[..., 2]
        if step >= 10:
            visited.append(points)
    cloud = np.concatenate(visited, axis=1)
    low, high = np.quantile(cloud, [0.01, 0.99], axis=1)
    positions = (cloud - low[:, None]) / np.maximum(high - low, 1e-6).max(1)[:, None, None] * (SIZE - 3) + 1
    cells = positions.round().astype(int).clip(0, SIZE - 1)
    counts = np.zeros((number, SIZE, SIZE))
    np.add.at(counts, (rows, cells[..., 1], cells[..., 0]), 1)
    return (255 * np.minimum(counts / 4, 1) ** 0.5).astype(np.uint8)


def draw_classes(rng: np.random.Generator, number: int) -> list[np.ndarray]:
    """Draw `number` systems whose images are neither nearly empty nor nearly full."""
    classes: list[np.ndarray] = []
    while len(classes) < number:
        system = draw_system(rng)
        fill = (render(system[None], _probabilities(system)[None], rng) > 0).mean()
        if MIN_FILL < fill < MAX_FILL:
            classes.append(system)
    return classes


def _probabilities(system: np.ndarray) -> np.ndarray:
    """Return the probability of each map, proportional to the area that it covers."""
    areas = np.abs(np.linalg.det(system[..., :2])) + 0.02
    return areas / areas.sum()


def draw_images(rng: np.random.Generator, num_classes: int, per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw (N, 1, SIZE, SIZE) uint8 images and their classes (N,)."""
    images, labels = [], []
    for label, system in enumerate(draw_classes(rng, num_classes)):
        perturbed = system * rng.uniform(0.92, 1.08, (per_class, *system.shape))
        images.append(render(perturbed, _probabilities(system)[None].repeat(per_class, 0), rng))
        labels.append(np.full(per_class, label))
    return torch.from_numpy(np.concatenate(images))[:, None], torch.from_numpy(np.concatenate(labels))


def pixel_values(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1


def augmented(images: torch.Tensor, stream: torch.Generator) -> torch.Tensor:
    """Shift images by up to 2 pixels, darken and invert them; shift and inversion are the same for the whole batch."""
    right, down, inversion = torch.randint(0, 1 << 20, (3,), generator=stream).tolist()
    images = images.roll((right % 5 - 2, down % 5 - 2), (2, 3))
    shade = 0.5 + 0.5 * torch.rand(len(images), 1, 1, 1, generator=stream)
    values = images.float() * shade
    return (255 - values if inversion % 4 == 0 else values) / 127.5 - 1


def pretrain(folder: Path, num_classes: int, images_per_class: int, epochs: int) -> None:
    """Train the model, and save it to `folder`."""
    rng, stream = np.random.default_rng(SEED), torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)
    images, labels = draw_images(rng, num_classes, images_per_class)
    order = torch.randperm(len(images), generator=stream)
    held_out, trained = order[: len(order) // HELD_OUT], order[len(order) // HELD_OUT :]
    print(f"{len(images)} images of {num_classes} fractals", flush=True)
    model, head = ViTModel(CONFIG), nn.Linear(CONFIG.hidden_size, num_classes)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05)
    steps = epochs * (len(trained) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.1)

    def logits(values: torch.Tensor) -> torch.Tensor:
        return head(model(values).last_hidden_state.mean(1))

    for epoch in range(epochs):
        shuffled, total = trained[torch.randperm(len(trained), generator=stream)], 0.0
        batches = shuffled.split(BATCH_SIZE)[: len(trained) // BATCH_SIZE]
        for batch in batches:
            loss = F.cross_entropy(logits(augmented(images[batch], stream)), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        with torch.inference_mode():
            predictions = [logits(pixel_values(images[part])).argmax(1) for part in held_out.split(500)]
        accuracy = (torch.cat(predictions) == labels[held_out]).float().mean()
        print(f"epoch {epoch + 1}: loss {total / len(batches):.3f}, held-out accuracy {accuracy:.3f}", flush=True)
    save(model, folder)


def save(model: ViTModel, folder: Path) -> None:
    """Save the model for `from_pretrained`, with weights in float16, and its image processor."""
    model.half().save_pretrained(folder)
    ViTImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
    ).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the model")
    parser.add_argument("--classes", type=int, default=300, help="number of classes")
    parser.add_argument("--images-per-class", type=int, default=100, help="number of images of each class")
    parser.add_argument("--epochs", type=int, default=16, help="passes over the images")
    options = parser.parse_args()
    pretrain(options.folder, options.classes, options.images_per_class, options.epochs)


if __name__ == "__main__":
    main()
