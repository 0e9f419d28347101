"""The style sheet of the page: readable on a phone, in dark mode, on paper, and without color."""

from __future__ import annotations

LIGHT = ("#0072b2", "#c24e00", "#00805d", "#b0578f", "#a87200", "#2b86bd")
DARK = ("#56b4e9", "#ff8a4c", "#33c79a", "#e59ac6", "#f0b429", "#9ad0f5")
"""Colors of lines, by ``curves.COLORS`` without its black: as dark or bright as text on the background must be."""


def _variables(colors: tuple[str, ...]) -> str:
    return "".join(f"--c{k}:{color};" for k, color in enumerate(colors))


STYLE = f"""
:root{{color-scheme:light dark;--text:#1b1b1b;--back:#fff;--grid:#e2e2e2;--dim:#595959;--wrong:#b34700;
{_variables(LIGHT)}}}
@media(prefers-color-scheme:dark){{:root{{--text:#e8e8e8;--back:#15171a;--grid:#3a3d42;--dim:#a8a8a8;--wrong:#ff8a4c;
{_variables(DARK)}}}}}
@media print{{details>*{{display:block}}}}
*{{box-sizing:border-box}}
body{{margin:0 auto;padding:1rem;max-width:76rem;font:16px/1.5 system-ui,sans-serif;color:var(--text);
background:var(--back)}}
h1{{font-size:1.5rem;line-height:1.2;overflow-wrap:anywhere}}h2{{font-size:1.2rem;margin:2.25rem 0 .5rem}}
h3{{font-size:1rem;margin:1.25rem 0 .25rem;overflow-wrap:anywhere}}
p,li{{max-width:46rem;overflow-wrap:anywhere}}small,figcaption,caption,.dim{{color:var(--dim)}}
code,pre{{font-size:.875rem}}code{{overflow-wrap:anywhere}}pre{{overflow-x:auto}}
a{{color:var(--c0)}}summary{{cursor:pointer;padding:.25rem 0}}
:focus-visible{{outline:2px solid var(--c0);outline-offset:2px}}
.scroll{{overflow-x:auto}}
table{{border-collapse:collapse;min-width:min(100%,20rem)}}caption{{text-align:left}}
th,td{{text-align:left;vertical-align:top;padding:.3rem 1rem .3rem 0;border-bottom:1px solid var(--grid)}}
thead th{{white-space:nowrap}}tbody th{{font-weight:normal}}td{{max-width:24rem;overflow-wrap:break-word}}
time{{white-space:nowrap}}td.number{{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}}
.curves{{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr))}}
figure{{margin:0}}figure.wide{{max-width:34rem}}figure svg{{width:100%;height:auto;display:block}}
svg *{{stroke-linejoin:round;stroke-linecap:butt}}
svg text{{fill:currentColor;font-family:system-ui,sans-serif!important}}
svg g[id*=label-] text{{paint-order:stroke;stroke:var(--back);stroke-width:3px;font-weight:bold}}
ol.legend{{list-style:none;margin:0 0 1rem;padding:0;display:grid;gap:.1rem 1.5rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr))}}
ol.legend svg{{width:3rem;height:1rem;vertical-align:middle;margin-right:.5rem}}
.row{{display:grid;grid-template-columns:repeat(9,minmax(0,1fr));gap:2px;margin:0 0 .4rem;max-width:44rem}}
.row img{{width:100%;aspect-ratio:1;display:block;border:3px solid transparent;image-rendering:pixelated}}
.row img.query{{border-color:var(--text)}}.row img.same{{border-color:var(--c0)}}
.row img.other{{border:3px dashed var(--wrong)}}
"""
