"""A recorded training step of prefix and tail has the losses and gradients of the plain computation."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from egmi.base.graphs import CapturedStep
from egmi.frozen.prefix import PackedPrefixes, run_prefix, run_tail, run_whole

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason='needs a GPU'))]
SIZES = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, initializer_range=.2)


class Rows(nn.Module):
    "Token rows and a head for each of several systems."
    def __init__(self, n_systems):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(n_systems, 16, 64))
        self.heads = nn.ModuleList(nn.Linear(64, 8) for _ in range(n_systems))

    def losses(self, hidden, target_B8):
        "One loss for each system; `hidden` runs the rows of all systems, system after system."
        B = len(target_B8)
        tokens_RnD = self.tokens.repeat_interleave(B, 0)
        parts = hidden(tokens_RnD).unflatten(0, (-1, B))
        found = [F.mse_loss(head(h_BnD.mean(1)), target_B8) for head, h_BnD in zip(self.heads, parts)]
        return torch.stack(found)


def make_llm(device):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval().requires_grad_(False).to(device)


def make_rows(device):
    torch.manual_seed(1)
    return Rows(2).to(device)


def batches():
    "Batches of three shapes, each twice with other values, padded on the left."
    generator = torch.Generator().manual_seed(2)
    for B, T in [(4, 8), (3, 16), (1, 8)] * 2:
        embeds_BTD = torch.randn(B, T, 64, generator=generator)
        mask_BT = torch.ones(B, T, dtype=torch.long)
        mask_BT[0, :3] = 0
        yield embeds_BTD, mask_BT, torch.randn(B, 8, generator=generator)


def plain_run(llm, rows, embeds_BTD, mask_BT, target_B8):
    "Losses and gradients from the whole sequence, one system after another."
    def hidden(tokens_RnD):
        parts = tokens_RnD.split(len(mask_BT))
        return torch.cat([run_whole(llm, embeds_BTD, mask_BT, part) for part in parts])

    rows.zero_grad()
    losses = rows.losses(hidden, target_B8)
    losses.sum().backward()
    return losses.detach(), [p.grad.clone() for p in rows.parameters()]


@pytest.mark.parametrize('device', DEVICES)
def test_recorded_prefix_and_tail(device):
    llm, rows = make_llm(device), make_rows(device)
    reference, wanted_rows = make_llm('cpu'), make_rows('cpu')

    def step(embeds_BTD, mask_BT, target_B8):
        cache = run_prefix(llm, embeds_BTD, mask_BT)
        losses = rows.losses(lambda tokens: run_tail(llm, cache, tokens), target_B8)
        losses.sum().backward()
        return losses

    captured = CapturedStep(step, rows.parameters(), device)
    for batch in batches():
        losses = captured(*batch)
        wanted, gradients = plain_run(reference, wanted_rows, *batch)
        torch.testing.assert_close(losses.cpu(), wanted, atol=1e-5, rtol=1e-3)
        for parameter, gradient in zip(rows.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad.cpu(), gradient, atol=1e-5, rtol=1e-3)
    assert captured.records == (device == 'cuda')
    assert len(captured.graphs) == (3 if device == 'cuda' else 0)


@pytest.mark.parametrize('device', DEVICES)
def test_kept_prompts_are_gathered_inside_a_recorded_step(device):
    llm, rows = make_llm(device), make_rows(device)
    embeds_BTD, mask_BT, target_B8 = next(batches())
    packed = PackedPrefixes.empty(llm, mask_BT.sum(1))
    packed.fill(0, run_prefix(llm, embeds_BTD.to(device), mask_BT.to(device)))

    def step(places_BT, target_B8):
        cache = packed.gather(places_BT)
        losses = rows.losses(lambda tokens: run_tail(llm, cache, tokens), target_B8)
        losses.sum().backward()
        return losses

    captured = CapturedStep(step, rows.parameters(), device)
    reference, wanted_rows = make_llm('cpu'), make_rows('cpu')
    for chosen in ([0, 2], [3, 1], [2, 2]):
        losses = captured(packed.places(chosen, multiple=8), target_B8[chosen])
        wanted, gradients = plain_run(
            reference, wanted_rows, embeds_BTD[chosen], mask_BT[chosen], target_B8[chosen])
        torch.testing.assert_close(losses.cpu(), wanted, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(rows.tokens.grad.cpu(), gradients[0], atol=1e-5, rtol=1e-3)
    assert len(captured.graphs) == (device == 'cuda')
