"""A comparison as one HTML file that needs nothing else: style, pictures and samples are inside."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .content import Page, interval, number, settings_table, visible
from .figures import COLORS, THEME, Picture

_SHOWN = 700  # characters of a completion that are not folded
_COLUMNS = 4  # evaluations in one table, beside the reference

_STYLE = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 74rem; padding: 1.2rem 1.2rem 4rem; background: var(--paper); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .4rem 0 .8rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--grid); }
h3 { font-size: 1rem; margin: 0 0 .3rem; }
p { margin: .5rem 0; max-width: 52rem; }
.headline { font-size: 1.12rem; font-weight: 500; max-width: 60rem; }
.faint, figcaption { color: var(--faint); font-size: .875rem; }
.runs { list-style: none; margin: 1rem 0; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; }
.swatch { display: inline-block; width: .75em; height: .75em; border-radius: 50%; margin-right: .45em;
  border: 2px solid var(--color); background: var(--color); }
.hollow { background: none; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .9rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .9rem .42rem .3rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--grid); overflow-wrap: break-word; }
thead th { vertical-align: bottom; min-width: 8.5rem; max-width: 16rem; }
.measures tbody th { position: sticky; left: 0; background: var(--paper); font-weight: 500; min-width: 6.5rem; }
.measures td { white-space: nowrap; }
.measures tbody th > * { display: block; }
.value { font-size: 1rem; }
.small { color: var(--faint); font-size: .8rem; }
b.better { color: var(--better); } b.worse { color: var(--worse); }
.number { text-align: right; }
.bar { display: block; height: .5rem; border-radius: .25rem; min-width: 2px; }
.barbox { width: 12rem; vertical-align: middle; }
.figures { display: grid; gap: 1.4rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.figures.panels { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; break-inside: avoid; } figure svg { width: 100%; height: auto; max-width: 42rem; display: block; }
.problem { margin: 1.6rem 0; }
.prompt { border-left: 3px solid var(--grid); padding-left: .8rem; }
.columns { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); }
.columns > div { min-width: 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .25rem 0; font: .82rem/1.45 ui-monospace, Menlo,
  Consolas, "DejaVu Sans Mono", monospace; }
.sample { border: 1px solid var(--grid); border-radius: .4rem; padding: .5rem .7rem; margin: .4rem 0; }
summary { cursor: pointer; color: var(--series-0); font-size: .875rem; }
td.setting { min-width: 7rem; max-width: 34rem; }
@media (max-width: 40rem) { body { padding: .8rem .8rem 3rem; } th, td { padding-right: .6rem; }
  thead th, .measures tbody th { min-width: 5.5rem; } .measures td .small { display: block; } .barbox { width: 5rem; } }
@media print { html { font-size: 11px; } body { max-width: none; padding: 0; } h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; } .measures tbody th { position: static; } .measures td { white-space: normal; }
  tr { break-inside: avoid; } thead th { min-width: 0; } td, th { padding-right: .5rem; }
  details::details-content { content-visibility: visible; block-size: auto; } .noprint { display: none; } }
"""

_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ page.title }}</title>
<style>
{{ style }}
</style>
</head>
<body>
{%- macro swatch(i) -%}
<span class="swatch{{ " hollow" if i >= colors }}" style="--color: var(--series-{{ i % colors }})"></span>
{%- endmacro %}
{%- macro picture(p) %}
<figure>
<h3>{{ p.title }}</h3>
{{ p.inline() | safe }}
<figcaption id="{{ p.name }}-caption">{{ p.caption }}</figcaption>
</figure>
{%- endmacro %}
{%- macro measured(row, cell) %}
<td>{% if cell.value is none %}<span class="small">–</span>{% else -%}
<span class="value">{{ number(cell.value.value, row.decimals) }}</span>
<span class="small">{{ interval(cell.value, row.decimals) }}</span>
{%- if cell.change %}{% set moved = row.moved(cell) %}
<div>
{%- if moved %}<b class="{{ moved }}">{{ number(cell.change.change, row.decimals, sign=True) }}</b>
{%- else %}{{ number(cell.change.change, row.decimals, sign=True) }}{% endif %}
<span class="small">{{ interval(cell.change, row.decimals) }}</span></div>
{%- endif %}{% endif %}</td>
{%- endmacro %}
<header>
<h1>{{ page.title }}</h1>
<p class="headline">{{ page.headline }}</p>
{%- for paragraph in page.text.split("\\n\\n") if paragraph.strip() %}
<p>{{ paragraph }}</p>
{%- endfor %}
<p class="faint">{{ facts }}</p>
<ul class="runs">
{%- for run in page.runs %}
<li>{{ swatch(loop.index0) }}{{ run.label }}{% if loop.first %} <span class="faint">(reference)</span>{% endif %}</li>
{%- endfor %}
</ul>
</header>
{%- if page.rows %}
<section>
<h2>Measures</h2>
{%- for block in blocks %}
<div class="scroll" tabindex="0" role="region" aria-label="Measures">
<table class="measures">
<thead><tr><th scope="col">measure</th>
{%- for i in block %}<th scope="col">{{ swatch(i) }}{{ page.runs[i].label }}</th>{% endfor %}</tr></thead>
<tbody>
{%- for row in page.rows %}
<tr><th scope="row" title="{{ row.info.meaning }}"><span>{{ row.info.label }}</span>
<span class="small">n = {{ row.prompts }}</span></th>
{%- for i in block %}{{ measured(row, row.cells[i]) }}{% endfor %}</tr>
{%- endfor %}
</tbody>
</table>
</div>
{%- endfor %}
<p class="faint">{{ page.reading }} Green is better, red is worse, black is neither by itself.</p>
<details><summary>What the measures are</summary>
<table>{% for row in page.rows %}<tr><th scope="row">{{ row.info.label }}</th><td>{{ row.info.meaning }}</td></tr>
{%- endfor %}</table></details>
</section>
{%- endif %}
{%- if main %}
<section>
<h2>Pictures</h2>
<div class="figures">{% for p in main %}{{ picture(p) }}{% endfor %}</div>
</section>
{%- endif %}
{%- if training %}
<section>
<h2>Over training</h2>
<div class="figures panels">{% for p in training %}{{ picture(p) }}{% endfor %}</div>
</section>
{%- endif %}
<section>
<h2>Cost</h2>
<div class="scroll">
<table><thead><tr><th scope="col">evaluation</th><th scope="col" class="number">tokens generated</th>
<th scope="col" class="number">per completion</th><th scope="col" class="number">times the reference</th>
<th scope="col" class="number">seconds</th><th class="noprint" aria-hidden="true"></th></tr></thead>
<tbody>
{%- for cost in page.costs %}
<tr><th scope="row">{{ swatch(loop.index0) }}{{ cost.label }}</th>
<td class="number">{{ optional(cost.tokens, 0) }}</td><td class="number">{{ optional(cost.per_completion, 1) }}</td>
<td class="number">{{ optional(cost.relative, 2) }}</td><td class="number">{{ optional(cost.seconds, 1) }}</td>
<td class="barbox noprint">{% if cost.tokens %}<span class="bar" style="background: var(--series-{{
 loop.index0 % colors }}); width: {{ (100 * cost.tokens / most) | round(1) }}%"></span>{% endif %}</td></tr>
{%- endfor %}
</tbody></table>
</div>
<p class="faint">Tokens that the model had to make, those of rejected proposals too.</p>
</section>
{%- if page.shown %}
<section>
<h2>Samples</h2>
<p class="faint">{{ page.choice }}</p>
{%- for shown in page.shown %}
<article class="problem">
<h3>Problem {{ shown.problem + 1 }} <span class="faint">({{ shown.reason }})</span></h3>
{{ folded(shown.prompt, "prompt") }}
<div class="columns">
{%- for run in page.runs %}
<div><strong>{{ swatch(loop.index0) }}{{ run.label }}</strong>
{%- for c in run.completions.get(shown.problem, [])[:page.shown_samples] %}
<div class="sample"><span class="small">{{ about(c) }}</span>{{ folded(visible(c.completion), "") }}</div>
{%- else %}
<p class="faint">no completions</p>
{%- endfor %}</div>
{%- endfor %}
</div>
</article>
{%- endfor %}
</section>
{%- endif %}
<section>
<h2>How it was made</h2>
{%- for note in page.notes %}
<p>{{ note }}</p>
{%- endfor %}
{%- if page.command %}
<p>This page: <code>{{ page.command }}</code></p>
{%- endif %}
<p class="faint">powerflow_fast {{ page.version }}</p>
{%- if different %}
<h3>Settings that differ</h3>
<div class="scroll"><table><thead><tr><th scope="col">setting</th>
{%- for run in page.runs %}<th scope="col">{{ swatch(loop.index0) }}{{ run.label }}</th>{% endfor %}</tr></thead>
<tbody>{% for key, values in different %}<tr><th scope="row">{{ key }}</th>
{%- for value in values %}<td class="setting">{{ visible(value) or "–" }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{%- endif %}
{%- if same %}
<details><summary>Settings that all share</summary>
<table>{% for key, value in same %}<tr><th scope="row">{{ key }}</th><td class="setting">{{ visible(value) }}</td></tr>
{% endfor %}</table></details>
{%- endif %}
</section>
</body>
</html>
"""

_FOLDED = """{% if rest %}<div class="{{ kind }}"><pre>{{ first }}…</pre>
<details><summary>{{ "{:,}".format(rest | length) }} more characters</summary><pre>{{ rest }}</pre></details></div>
{%- else %}<div class="{{ kind }}"><pre>{{ first or "(empty)" }}</pre></div>{% endif %}"""


def render_html(page: Page, pictures: Sequence[Picture]) -> str:
    """The page; every text in it is escaped, and it loads nothing."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    fold = environment.from_string(_FOLDED)

    def folded(text: str, kind: str) -> Markup:
        cut = len(text) if len(text) <= _SHOWN * 1.25 else _SHOWN
        return Markup(fold.render(first=text[:cut], rest=text[cut:], kind=kind))

    same, different = settings_table(page.runs)
    return environment.from_string(_TEMPLATE).render(
        page=page,
        style=Markup(_colors() + _STYLE),
        colors=COLORS,
        facts=facts(page),
        blocks=_blocks(len(page.runs)),
        main=[p for p in pictures if not p.name.startswith("history-")],
        training=[p for p in pictures if p.name.startswith("history-")],
        most=max((cost.tokens or 0 for cost in page.costs), default=0),
        same=same,
        different=different,
        number=number,
        interval=interval,
        optional=lambda value, decimals: "–" if value is None else number(value, decimals),
        about=about,
        folded=folded,
        visible=visible,
    )


def _blocks(count: int) -> list[list[int]]:
    """Columns of each table: all others in parts that fit on a page, the reference at the head of each."""
    tables = math.ceil((count - 1) / _COLUMNS)
    others = range(1, count)
    return [[0, *others[k * (count - 1) // tables : (k + 1) * (count - 1) // tables]] for k in range(tables)]


def facts(page: Page) -> str:
    """What was compared, in one line."""
    run = page.runs[0]
    samples = "" if run.num_samples is None else f" × {run.num_samples} completions"
    return f"{len(page.runs)} evaluations of {run.problems}: {run.prompts} problems{samples}."


def about(completion: dict) -> str:
    """Score, length and end of a completion in a few words."""
    score, tokens = completion.get("score"), completion.get("tokens")
    parts = [] if score is None else [f"score {score:g}"]
    parts += [] if tokens is None else [f"{tokens} tokens"]
    parts += ["cut off"] if completion.get("finished") is False else []
    return ", ".join(parts)


def _colors() -> str:
    extra = {"better": ("#1b7f4b", "#5cc28f"), "worse": ("#b3261e", "#ef7a8a")}
    light, dark = (" ".join(f"--{role}: {pair[k]};" for role, pair in {**THEME, **extra}.items()) for k in (0, 1))
    return f"""
:root {{ color-scheme: light dark; {light} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}
"""
