"""Small tables in HTML, for notebooks: what `_repr_html_` of reports gives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jinja2 import Environment

_TABLE = """\
{% if head %}<table>
{% if caption %}<caption style="text-align:left">{{ caption }}</caption>
{% endif %}<thead><tr>{% for cell in head %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}<tr><th scope="row" style="text-align:left">{{ row[0] }}</th>
{%- for cell in row[1:] %}<td style="text-align:right">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table>
{% endif %}{% for note in notes %}<p>{{ note }}</p>
{% endfor %}"""


def html_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", notes: Sequence[str] = ()
) -> str:
    """A table in HTML, its first column a header; all text is escaped.

    Args:
        head: a title for each column.
        rows: as many texts each.
        caption: above the table.
        notes: a paragraph each, below it.
    """
    template = Environment(autoescape=True).from_string(_TABLE)
    return template.render(head=head, rows=list(rows), caption=caption, notes=notes)
