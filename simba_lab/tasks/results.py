"""What one document contributes to each metric: the functions that our YAML files name for ``process_results``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# (log-likelihood in nats, is it the greedy continuation) of one request.
Answer = tuple[float, bool]


def suffix_quality(doc: dict[str, Any], results: Sequence[Answer]) -> dict[str, Any]:
    """Nats per token of the scored text, tokens as counted at build time, and what bits per byte need."""
    ((log_likelihood, _),) = results
    return {
        "nats_per_token": -log_likelihood / doc["n_tokens"],
        "bits_per_byte": (log_likelihood, doc["n_bytes"]),
    }


def recall(doc: dict[str, Any], results: Sequence[Answer]) -> dict[str, float]:
    """Is the answer the likeliest choice, would the model have said it unprompted, and how surprised was it (nats)."""
    likelihoods = [log_likelihood for log_likelihood, _ in results]
    right = doc["answer"]
    return {
        "acc": float(likelihoods.index(max(likelihoods)) == right),
        "exact_match": float(results[right][1]),
        "answer_nats": -likelihoods[right],
    }
