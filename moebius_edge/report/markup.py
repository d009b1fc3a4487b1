"""HTML that the page's sections share: tables, figures in two widths. Text is escaped here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

from .charts import NARROW, WIDE
from .figures import Configuration, Results, label, machine_label
from .table import Column, cells, failure


def html_table(
    columns: Sequence[Column],
    configurations: Sequence[Configuration],
    numbers: Mapping[str, int],
    results: Results,
    attributes: Sequence[str] | None = None,
    name: str = "",
) -> str:
    """A row for each configuration; ``attributes`` are markup for the rows. A cell carries what it sorts by."""
    headings = [_heading("No.", "", True), _heading("Configuration", "", False)]
    headings += [_heading(column.title, column.unit, column.numeric) for column in columns]
    by_column = [cells(column, configurations) for column in columns]
    rows = []
    for index, configuration in enumerate(configurations):
        number = numbers[configuration["id"]]
        text = escape(label(configuration))
        where = machine_label(results, configuration["machine"]) if len(results["machines"]) > 1 else ""
        notes = [(where, "reason"), (failure(configuration) or "", "reason bad")]
        below = "".join(f'<span class="{kind}">{escape(note)}</span>' for note, kind in notes if note)
        row = [
            f'<td class="figure" data-value="{number}">{number}</td>',
            f'<th scope="row" data-value="{text}">{text}{below}</th>',
        ]
        for column, found in zip(columns, by_column, strict=True):
            value = found[index].value
            sort_key = "" if value is None else f' data-value="{escape(str(value))}"'
            row.append(f'<td class="{_class(column)}"{sort_key}>{escape(found[index].text)}</td>')
        rows.append(f"<tr {attributes[index] if attributes else ''}>{''.join(row)}</tr>")
    identity = f' id="{name}"' if name else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table"><table{identity}>'
        f"<thead><tr>{''.join(headings)}</tr></thead>\n<tbody>{chr(10).join(rows)}</tbody></table></div>"
    )


def simple_table(headings: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A table of texts; the columns numbered in ``numeric`` are aligned right."""

    def aligned(index: int) -> str:
        return ' class="figure"' if index in numeric else ""

    head = "".join(f'<th scope="col"{aligned(i)}>{escape(h)}</th>' for i, h in enumerate(headings))
    lines = []
    for first, *rest in rows:
        others = "".join(f"<td{aligned(i)}>{escape(text)}</td>" for i, text in enumerate(rest, start=1))
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{others}</tr>')
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def figure(caption: str, draw: Callable[..., str], note: str = "") -> str:
    """A chart drawn for a wide and for a narrow window; the style sheet shows one of them."""
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{draw(width=WIDE)}{draw(width=NARROW)}{below}</figure>"


def _heading(title: str, unit: str, numeric: bool) -> str:
    shown = f'<span class="name">{escape(title)}</span>'
    shown += f' <span class="unit">{escape(unit)}</span>' if unit else ""
    return f'<th scope="col" class="{"figure" if numeric else "word"}">{shown}</th>'


def _class(column: Column) -> str:
    if column.numeric:
        return "figure"
    return "standing" if column.title == "Standing" else "word"
