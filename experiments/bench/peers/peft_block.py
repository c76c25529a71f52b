"""The block of `lowrank.py` and `many_adapters.py` in torch and PEFT, timed.

Command:  python peft_block.py step|many WIDTH HEADS INNER BATCH LENGTH RANK ROUNDS

Prints CPU seconds of one thread as a JSON line.
"""

from collections.abc import Callable
import json
import sys
import time
from typing import Any

import peft
import torch
import torch.nn.functional as F

WHAT = sys.argv[1]
D, HEADS, INNER, B, S, RANK, ROUNDS = map(int, sys.argv[2:])
NAMES = ["q", "k", "v", "o", "up", "down"]


class Block(torch.nn.Module):
    """A pre-norm block: causal attention and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        line = lambda n, m: torch.nn.Linear(n, m, bias=False)
        self.n1, self.n2 = torch.nn.LayerNorm(D), torch.nn.LayerNorm(D)
        self.q, self.k, self.v, self.o = (line(D, D) for _ in range(4))
        self.up, self.down = line(D, INNER), line(INNER, D)

    def forward(self, x: Any) -> Any:
        """`[b, s, d]` of `[b, s, d]`."""
        h, cut = self.n1(x), lambda y: y.view(B, S, HEADS, -1).transpose(1, 2)
        q, k, v = cut(self.q(h)), cut(self.k(h)), cut(self.v(h))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).reshape(B, S, D))
        return x + self.down(F.gelu(self.up(self.n2(x)), approximate="tanh"))


def least(call: Callable[[], Any]) -> float:
    """CPU seconds of the fastest of several calls, after two."""
    taken = []
    for _ in range(ROUNDS + 2):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return min(taken[2:])


def step() -> dict[str, float]:
    """A training step, eager and compiled."""
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=NAMES)
    model = peft.get_peft_model(Block(), config)
    mine = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(mine, lr=1e-4)
    x = torch.randn(B, S, D, requires_grad=True)

    def call(loss: Callable[[Any], Any]) -> None:
        x.grad = None
        loss(x).backward()
        optimizer.step()
        optimizer.zero_grad()

    loss = lambda x: model(x).square().mean()
    fast = torch.compile(loss)
    return {
        "peft/s": least(lambda: call(loss)),
        "peft_compiled/s": least(lambda: call(fast)),
    }


def many() -> dict[str, float]:
    """A forward by one adapter, and by one per example."""
    config = lambda: peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=NAMES, init_lora_weights=False
    )
    names = [f"a{i}" for i in range(B)]
    model = peft.get_peft_model(Block(), config(), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config())
    model.eval()
    x = torch.randn(B, S, D)
    with torch.no_grad():
        one = least(lambda: model(x))
        each = least(lambda: model(x, adapter_names=names))
    return {"peft_one/s": one, "peft_each/s": each}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(step() if WHAT == "step" else many()))
