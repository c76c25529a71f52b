"""Golden logits of the two released CIFAR ResNets, by torch in float64 on CPU.

Run in an environment of its own (torch 2.13.0, numpy), WEIGHTS the folder of
resnet20-12fca82f.npz, A_pretrained_HEAD.npz and C_trained_2025.npz:
  python tests/numerics/make/resnet_golden.py tests/numerics/resnets.npz WEIGHTS

ResNet-20 is akamaster/pytorch_resnet_cifar10's with option A; ResNet-8 is the graph of
mlcommons/tiny's resnet_v1_eembc: TensorFlow pads "SAME" more at the end than at the
start. Contents: images (uint8), resnet20, A, C; about (json).
"""

from importlib.metadata import version
import json
from pathlib import Path
import sys

import numpy as np
import torch
from torch import nn
import torch.nn.functional as F

SEED = 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.stride = 1 if before == after else 2
        self.grow = (after - before) // 2
        self.conv1 = nn.Conv2d(before, after, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        s = self.stride
        return F.relu(y + F.pad(x[:, :, ::s, ::s], (0, 0, 0, 0, self.grow, self.grow)))


class ResNet20(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for i, (n, m) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
            blocks = [Block(n, m), Block(m, m), Block(m, m)]
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.avg_pool2d(x, x.shape[-1]).flatten(1))


def resnet20(weights, images):
    model = ResNet20()
    state = {k: torch.from_numpy(v) for k, v in weights.items()}
    missing, extra = model.load_state_dict(state, strict=False)
    assert not extra
    assert all(name.endswith("num_batches_tracked") for name in missing)
    scaled = (images / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return model.double().eval()(scaled.permute(0, 3, 1, 2))


def resnet8(weights, images):
    w = {k: torch.from_numpy(v).double() for k, v in weights.items()}

    def conv(number, x, stride):
        kernel = w[f"{number:02}_Conv2D_kernel"].permute(3, 2, 0, 1)
        more = max(kernel.shape[-1] - stride, 0) if x.shape[-1] % stride == 0 else None
        x = F.pad(x, (more // 2, more - more // 2) * 2)
        return F.conv2d(x, kernel, w[f"{number:02}_Conv2D_bias"], stride)

    def norm(number, x):
        names = ("moving_mean", "moving_variance", "gamma", "beta")
        parts = [w[f"{number:02}_BatchNormalization_{n}"] for n in names]
        return F.batch_norm(x, *parts, training=False, eps=1e-3)

    x = F.relu(norm(1, conv(0, images.permute(0, 3, 1, 2), 1)))
    y = F.relu(norm(3, conv(2, x, 1)))
    x = F.relu(x + norm(5, conv(4, y, 1)))
    y = F.relu(norm(7, conv(6, x, 2)))
    x = F.relu(conv(9, x, 2) + norm(10, conv(8, y, 1)))
    y = F.relu(norm(12, conv(11, x, 2)))
    x = F.relu(conv(14, x, 2) + norm(15, conv(13, y, 1)))
    return F.avg_pool2d(x, 8).flatten(1) @ w["16_Dense_kernel"] + w["16_Dense_bias"]


def main(path, folder):
    rng = np.random.default_rng(SEED)
    coarse = rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    images = coarse.repeat(4, 1).repeat(4, 2)
    x = torch.from_numpy(images).double()
    load = lambda name: dict(np.load(Path(folder) / f"{name}.npz"))
    with torch.no_grad():
        out = {
            "resnet20": resnet20(load("resnet20-12fca82f"), x),
            "A": resnet8(load("A_pretrained_HEAD"), x),
            "C": resnet8(load("C_trained_2025"), x),
        }
    about = {
        "generator": "tests/numerics/make/resnet_golden.py",
        "torch": version("torch"),
        "seed": SEED,
    }
    found = {k: v.numpy() for k, v in out.items()}
    about = np.array(json.dumps(about))
    np.savez_compressed(path, images=images, about=about, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
