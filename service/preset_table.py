"""The presets as a table for a person: with colours on a terminal, plain text otherwise."""

from collections.abc import Iterator, Sequence
from typing import TextIO

from rich.console import Console

from service.protocol.command_lines import Listed

_HEADER = (
    "name",
    "parameters",
    "download",
    "float32",
    "bfloat16",
    "KV cache",
    "instruct",
    "cached",
)
_NUM_TEXT_COLUMNS = 1


def print_presets(presets: Sequence[Listed], stream: TextIO) -> None:
    """Writes one line for each preset, and what the columns mean."""
    rows = [_cells(preset) for preset in presets]
    header, *lines = _aligned([_HEADER, *rows])
    context_tokens = max((preset.context_tokens for preset in presets), default=0)
    # Writes plain text if the stream is no terminal.
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    # Soft: a terminal that is too narrow breaks the lines; rich would cut names to pieces.
    console.print(header, style="bold", soft_wrap=True)
    for line, preset in zip(lines, presets, strict=True):
        console.print(line, style=None if preset.is_cached else "dim", soft_wrap=True)
    console.print(f"\n{_legend(context_tokens)}", style="dim", soft_wrap=True)


def _cells(preset: Listed) -> tuple[str, ...]:
    return (
        preset.name,
        in_units(preset.num_parameters, ("K", "M", "B")),
        in_bytes(preset.download_bytes) if preset.download_bytes else "none",
        in_bytes(preset.float32_bytes),
        in_bytes(preset.bfloat16_bytes),
        in_bytes(preset.kv_cache_bytes_per_slot),
        "yes" if preset.is_instruct else "no",
        "yes" if preset.is_cached else "no",
    )


def _legend(context_tokens: int) -> str:
    return (
        "download: about, two bytes a parameter. float32, bfloat16: memory of the weights.\n"
        f"KV cache: memory of one slot of {context_tokens:,} tokens, or of the preset's context if "
        "that is less.\nWork space comes on top."
    )


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if index < _NUM_TEXT_COLUMNS else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells)


def in_bytes(number: int) -> str:
    """1,234,567 is "1.23 MB"."""
    return in_units(number, ("KB", "MB", "GB", "TB"))


def in_units(number: int, units: Sequence[str]) -> str:
    """Two decimals in the largest unit, each a thousand times the one before, that is not above."""
    scaled, unit = number / 1000, units[0]
    for larger in units[1:]:
        if scaled < 1000:
            break
        scaled, unit = scaled / 1000, larger
    return f"{scaled:.2f} {unit}"
