"""Learning rates follow their stated course."""

import pytest
import torch
import transformers
from torch import nn

from sdlora import optimizer


def test_cosine_with_warmup_equals_transformers() -> None:
    weights = [nn.Parameter(torch.zeros(2))]
    reference = torch.optim.AdamW(weights, lr=1.0)
    schedule = transformers.get_cosine_schedule_with_warmup(reference, num_warmup_steps=10, num_training_steps=100)
    for step in range(99):
        reference.step()
        schedule.step()  # transformers starts at 0 and is one step behind during warm-up
        ours = optimizer.rate_factor(step if step < 10 else step + 1, steps=100, warmup=0.1, schedule="cosine")
        assert ours == pytest.approx(reference.param_groups[0]["lr"], abs=1e-9)


def test_constant_stays_and_each_group_has_its_own_peak() -> None:
    one, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    adamw = optimizer.adamw([([one], 1e-3), ([other], 1e-4), ([], 1.0)], weight_decay=0.01)
    assert [optimizer.rate_factor(s, steps=10, warmup=0.2, schedule="constant") for s in (0, 1, 2, 9)] == [0.5, 1, 1, 1]
    optimizer.set_rates(adamw, 0.5)
    assert [group["lr"] for group in adamw.param_groups] == [5e-4, 5e-5]
