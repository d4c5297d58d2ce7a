"""How much of what was computed was padding, from the service's own counters."""

from collections.abc import Mapping

from bench.service_metrics import metrics_text, series

_SERIES = 'gemma_computed_tokens_total{{use="{use}",work="{work}"}}'


def computed_tokens(url: str) -> dict[str, float]:
    """The four counters: tokens of ``prefill`` and ``decode``, for requests and for padding."""
    text = metrics_text(url)
    return {
        f"{work} {use}": series(text, _SERIES.format(use=use, work=work))
        for work in ("prefill", "decode")
        for use in ("request", "padding")
    }


def padding_share(before: Mapping[str, float], after: Mapping[str, float], work: str) -> float:
    """Of what was computed between two readings; 0 if it was nothing."""
    padding, request = (
        after[f"{work} {use}"] - before[f"{work} {use}"] for use in ("padding", "request")
    )
    return padding / (padding + request) if padding + request else 0.0
