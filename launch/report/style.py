"""How a report looks: light, dark and on paper."""

_LIGHT = """
--paper: #ffffff; --card: #f6f7f9; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --grid: #e3e6ea;
--mark: #fff4c7; --link: #0b5cad;
--run-0: #0b62c4; --run-1: #c2410c; --run-2: #15803d; --run-3: #8b2fc9; --run-4: #be185d; --run-5: #0e7490;
--run-6: #946200; --run-7: #4b5563; color-scheme: light;
"""
_DARK = """
--paper: #12161c; --card: #1b2129; --ink: #e6edf3; --soft: #a3adb8; --line: #3a434e; --grid: #2b333d;
--mark: #4a3f12; --link: #7ab8ff;
--run-0: #6cb2ff; --run-1: #ff9d66; --run-2: #6ee08f; --run-3: #cf9fff; --run-4: #ff8cc0; --run-5: #5fd3e6;
--run-6: #e8c15a; --run-7: #b6bec9; color-scheme: dark;
"""

CSS = f"""
:root {{ {_LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
* {{ box-sizing: border-box; }}
body {{
  margin: 0 auto; max-width: 76rem; padding: 1.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}}
h1 {{ font-size: 1.9rem; line-height: 1.2; margin: 0 0 .25rem; }}
h2 {{ font-size: 1.35rem; margin: 3rem 0 .75rem;
  padding-bottom: .3rem; border-bottom: 2px solid var(--line); }}
h3 {{ font-size: 1.05rem; margin: 1.75rem 0 .5rem; }}
p {{ margin: .4rem 0 .8rem; max-width: 60rem; overflow-wrap: anywhere; }}
.soft, .caption, figcaption {{ color: var(--soft); font-size: .9rem; }}
nav a {{ display: inline-block; margin: .25rem 1.1rem .25rem 0; }}
a {{ color: var(--link); }}
a:focus-visible, [tabindex]:focus-visible {{ outline: 3px solid var(--link); outline-offset: 2px; }}
.run {{
  background: var(--card); border: 1px solid var(--line); border-left: 6px solid var(--tone, var(--line));
  border-radius: 6px; padding: .8rem 1.1rem; margin: .8rem 0;
}}
.run h3 {{ margin: 0 0 .2rem; overflow-wrap: anywhere; }}
.run p {{ margin: .2rem 0; }}
.warning {{ background: var(--mark); color: var(--ink); border-radius: 4px; padding: .05rem .35rem; }}
.legend {{ list-style: none; padding: 0; margin: .25rem 0 1rem; display: flex;
  flex-wrap: wrap; gap: .2rem 1.5rem; }}
.legend li {{ overflow-wrap: anywhere; }}
.swatch {{ width: 2.25em; height: .75em; margin-right: .5em; vertical-align: baseline; }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); gap: 1rem; }}
figure {{ margin: 0; padding: .7rem .8rem; border: 1px solid var(--line); border-radius: 6px; }}
figure.broad {{ margin: 1rem 0; overflow-x: auto; }}
/* On a telephone it scrolls: smaller, its text could not be read. */
.broad .plot {{ min-width: 46rem; }}
figure h4 {{ margin: 0 0 .2rem; font: 600 .95rem ui-monospace, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; }}
.plot {{ display: block; width: 100%; height: auto; }}
/* matplotlib names a font in every text. */
.plot text {{ font-family: inherit !important; }}
video, figure img {{ display: block; width: 100%; max-width: 34rem; height: auto; }}
.wide {{ overflow-x: auto; margin: 0 0 1.25rem; }}
table {{ border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }}
.caption {{ margin: 1rem 0 .2rem; }}
th, td {{ padding: .32rem .6rem; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top; }}
thead th {{ border-bottom: 2px solid var(--line); vertical-align: bottom; }}
tbody th {{ font-weight: 600; min-width: 7rem; }}
.number {{ text-align: right; white-space: nowrap; }}
.differs > * {{ background: var(--mark); }}
.config td, .config th, code {{
  font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .85rem;
}}
td, th {{ overflow-wrap: break-word; max-width: 26rem; }}
code {{ overflow-wrap: anywhere; }}
td .soft {{ white-space: nowrap; }}
@media print {{
  html {{ font-size: 11px; }}
  body {{ max-width: none; padding: 0; font-size: 1rem; }}
  nav {{ display: none; }}
  figure, .run, tr {{ break-inside: avoid; }}
  h2, h3, .legend, .soft, .caption {{ break-after: avoid; }}
  .grid {{ grid-template-columns: repeat(3, 1fr); gap: .5rem; }}
  .wide, figure.broad {{ overflow: visible; }}
  .broad .plot {{ min-width: 0; }}
  th, td {{ padding: .2rem .4rem; }}
  * {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
}}
"""
