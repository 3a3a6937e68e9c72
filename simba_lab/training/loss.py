"""What training minimises, as a module of its own, so that one call is the whole forward pass of a step."""

from __future__ import annotations

from torch import Tensor, nn

from simba_lab.model import LanguageModel

IGNORED = -100


class TokenLoss(nn.Module):
    """Mean negative log-likelihood of the scored labels, in nats.

    Args:
        lm: the model; its parameters are this module's.
        n_context: tokens that may be pruned: boundary and suffix are scored (protocol ``suffix``). None: all.
    """

    def __init__(self, lm: LanguageModel, n_context: int | None) -> None:
        super().__init__()
        self.lm, self.n_context = lm, n_context

    def scored(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, V), in the dtype the head computes in, and labels (n,) of the scored positions of (B, L) input.

        Labels of ``IGNORED`` stand among them.
        """
        if self.n_context is None:
            return self.lm(tokens).logits.flatten(0, 1), labels.flatten()
        logits = self.lm(tokens, n_context=self.n_context).logits
        return logits.flatten(0, 1), labels[:, self.n_context - 1 :].flatten()

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The loss, a scalar in fp32 at least, of ``tokens`` and ``labels`` (B, L) int64."""
        return self.lm.backend.cross_entropy(*self.scored(tokens, labels), IGNORED)
