"""AutoDropout's controller: a transformer that writes patterns token by token, and is rewarded."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medseg_reg.study.samplers.settings import ControllerSpec


class Controller(nn.Module):
    """A policy over sequences of choices: log P(r) = sum over t of log P(r_t | r_1 ... r_(t-1)).

    A causal transformer reads a start token and the tokens so far, each with an embedding of its
    own for its place, and a linear layer for each place gives the logits of the next token. The
    linear layers begin at zero, so an untrained controller is uniform over all sequences. All in
    float64.

    Args:
        choices: how many values each of the T parameters has.
        settings: its size.

    Shapes:
        Tokens are (N, T) integers; log-probabilities and entropies (N,), in nats.

    Example:
        >>> log_p, entropy = Controller([2, 5])(torch.tensor([[1, 3]]))
        >>> round(log_p.exp().item(), 6), round(entropy.exp().item(), 6)
        (0.1, 10.0)
    """

    def __init__(self, choices: Sequence[int], settings: ControllerSpec | None = None) -> None:
        super().__init__()
        settings = settings or ControllerSpec()
        self.choices, width = tuple(choices), settings.width
        firsts = [1 + sum(self.choices[:place]) for place in range(len(self.choices))]
        self.register_buffer("firsts", torch.tensor(firsts), persistent=False)
        self.embedding = nn.Embedding(1 + sum(self.choices), width)  # 0 is the start token
        self.places = nn.Parameter(0.02 * torch.randn(len(self.choices), width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                *(width, settings.heads, 4 * width), dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(settings.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in self.choices)
        for head in self.heads.parameters():
            nn.init.zeros_(head)
        self.double()

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return log P of each sequence, and the sum of the entropies of its T conditionals.

        The mean of the latter over sequences that the policy draws is the policy's entropy.
        """
        states = self._states(tokens[:, :-1])
        log_p = entropy = states.new_zeros(len(tokens))
        for place, head in enumerate(self.heads):
            logs = head(states[:, place]).log_softmax(-1)
            log_p = log_p + logs.gather(1, tokens[:, place, None]).squeeze(1)
            entropy = entropy - (logs.exp() * logs).sum(1)
        return log_p, entropy

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw sequences, one token after the other."""
        tokens = torch.empty(count, 0, dtype=torch.long)
        for head in self.heads:
            shares = head(self._states(tokens)[:, -1]).softmax(-1)
            drawn = torch.multinomial(shares, 1, generator=generator)
            tokens = torch.cat([tokens, drawn], 1)
        return tokens

    def _states(self, prefix: Tensor) -> Tensor:
        """Return what the policy knows before each token: (N, t) tokens to (N, t + 1, width)."""
        firsts: Tensor = self.firsts  # type: ignore[assignment]
        read = prefix + firsts[: prefix.shape[1]]
        read = torch.cat([read.new_zeros(len(read), 1), read], 1)
        states = self.embedding(read) + self.places[: read.shape[1]]
        future = torch.ones(read.shape[1], read.shape[1], dtype=torch.bool).triu(1)
        for block in self.blocks:
            states = block(states, src_mask=future)
        known: Tensor = self.norm(states)
        return known


def policy_loss(
    log_p: Tensor, entropy: Tensor, advantages: Tensor, entropy_weight: float
) -> Tensor:
    """The loss whose gradient is that of REINFORCE: -mean(A log P(r)) - w mean(entropy).

    Over sequences that the policy draws, the gradient of the first term has as its mean that of
    minus the expected reward, whatever baseline is in A = R - b (Williams, Machine Learning 1992,
    8:229-256). That of the second holds the tokens before each conditional fixed.
    """
    return -(advantages * log_p).mean() - entropy_weight * entropy.mean()


class ControllerSampler:
    """Proposes what the controller draws, and takes a step of policy gradient for each round.

    The baseline b is the moving mean of the rewards of the rounds before (in the first round its
    own mean), and A = R - b is divided by its running root mean square if `scale_rewards`.
    Failures (NaN) are left out.

    Args:
        choices: how many values each parameter has.
        seed: of the weights and of the draws.
        settings: of the controller.

    Paper:
        H. Pham, Q. V. Le, "AutoDropout: Learning Dropout Patterns to Regularize Deep Networks",
        AAAI 2021, 35(11):9351-9359, arXiv 2101.01761: a Transformer that generates the tokens of
        a pattern one after the other, trained by REINFORCE on the validation performance of the
        network that was trained with it. Its size, learning rate, baseline and entropy weight, and
        the values of each token, were not found; baseline and entropy are those of such
        controllers since Bello et al., "Neural Combinatorial Optimization with Reinforcement
        Learning", ICLR 2017 workshop, arXiv 1611.09940.

    Example:
        >>> search = ControllerSampler([4], seed=0, settings=ControllerSpec(lr=0.05))
        >>> for _ in range(30):
        ...     asked = search.ask(8)
        ...     search.tell(asked, [float(tokens == (2,)) for tokens in asked])
        >>> sum(tokens == (2,) for tokens in search.ask(100)) > 80
        True
    """

    def __init__(
        self, choices: Sequence[int], seed: int = 0, settings: ControllerSpec | None = None
    ) -> None:
        self.settings = settings or ControllerSpec()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.controller = Controller(choices, self.settings)
        self._generator = torch.Generator().manual_seed(seed)
        self._optimizer = torch.optim.Adam(self.controller.parameters(), lr=self.settings.lr)
        self.baseline: float | None = None
        self._square = 0.0

    def ask(self, count: int) -> list[tuple[int, ...]]:
        """Draw sequences from the policy."""
        drawn = self.controller.sample(count, self._generator)
        return [tuple(row) for row in drawn.tolist()]

    def tell(self, asked: Sequence[tuple[int, ...]], rewards: Sequence[float]) -> None:
        """Take one step on a round of proposals."""
        pairs = zip(asked, rewards, strict=True)
        known = [(tokens, reward) for tokens, reward in pairs if not math.isnan(reward)]
        if not known:
            return
        tokens = torch.tensor([one for one, _ in known])
        advantages = self._advantages(torch.tensor([r for _, r in known], dtype=torch.float64))
        log_p, entropy = self.controller(tokens)
        self._optimizer.zero_grad()
        policy_loss(log_p, entropy, advantages, self.settings.entropy).backward()
        self._optimizer.step()

    def _advantages(self, rewards: Tensor) -> Tensor:
        """Return the rewards less the baseline, scaled if that is wanted, and move both on."""
        mean, decay = rewards.mean().item(), self.settings.baseline_decay
        first = self.baseline is None
        before = mean if self.baseline is None else self.baseline
        self.baseline = decay * before + (1.0 - decay) * mean
        advantages = rewards - before
        if not self.settings.scale_rewards:
            return advantages
        square = advantages.square().mean().item()
        first = first or self._square == 0.0
        self._square = square if first else decay * self._square + (1.0 - decay) * square
        return advantages / math.sqrt(self._square) if self._square > 0.0 else advantages
