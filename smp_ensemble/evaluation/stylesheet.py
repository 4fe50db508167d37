"""How the page looks: on a screen of any width, light and dark, and on paper."""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --ground: #fafaf8; --card: #ffffff; --ink: #1f2933; --soft: #56616e; --line: #dfe3e8; --band: #f3f5f7;
  --accent: #ad4a00; --tint: #fdebdd; --blue: #00619a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14181d; --card: #1c2228; --ink: #e7eaee; --soft: #a3aebb; --line: #343d47; --band: #232a32;
    --accent: #ff9d57; --tint: #4a2c14; --blue: #6fbdf0;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
@media (prefers-reduced-motion: no-preference) { html { scroll-behavior: smooth; } }
body { margin: 0; background: var(--ground); color: var(--ink); font: 1rem/1.6 system-ui, -apple-system, "Segoe UI",
  Roboto, "Liberation Sans", sans-serif; overflow-wrap: break-word; }
main { max-width: 64rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.6rem, 4.5vw, 2.4rem); line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 1.25rem; }
h2 { font-size: 1.35rem; line-height: 1.25; letter-spacing: -0.01em; margin: 0 0 0.75rem; }
p { max-width: 44rem; margin: 0 0 1rem; }
a { color: var(--blue); }
code { font: 0.9em ui-monospace, "Liberation Mono", monospace; }
.eyebrow { color: var(--accent); font-weight: 600; font-size: 0.85rem; letter-spacing: 0.06em; margin: 0 0 0.4rem; }
.facts { display: flex; flex-wrap: wrap; gap: 0.5rem 2rem; margin: 0 0 1.5rem; font-size: 0.92rem; }
.facts div { min-width: 0; }
.facts dt { color: var(--soft); font-size: 0.8rem; }
.facts dd { margin: 0; }
.headline { background: var(--card); border: 1px solid var(--line); border-left: 5px solid var(--accent);
  border-radius: 10px; padding: 1.25rem 1.5rem 0.5rem; }
.headline p { max-width: none; }
.headline p:first-child { font-size: clamp(1.1rem, 2.6vw, 1.35rem); line-height: 1.4; font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 0.75rem; padding: 0;
  margin: 1rem 0 1.5rem; list-style: none; }
.tiles li { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 0.7rem 0.9rem; }
.tiles span { display: block; color: var(--soft); font-size: 0.8rem; }
.tiles b { font-size: 1.45rem; line-height: 1.3; font-variant-numeric: tabular-nums; letter-spacing: -0.01em; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; list-style: none; padding: 0; margin: 0; }
section { margin-top: 3rem; padding-top: 2rem; border-top: 1px solid var(--line); }
.how { color: var(--soft); font-size: 0.92rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 10px; background: var(--card);
  margin: 0 0 1.25rem; }
.scroll:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: 0.85rem; padding: 0.7rem 0; }
caption span { display: block; position: sticky; left: 0.75rem; margin-left: 0.75rem;
  width: min(100% - 1.5rem, 100vw - 4.5rem); }
th, td { padding: 0.4rem 0.65rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--card); max-width: 18rem;
  overflow: hidden; text-overflow: ellipsis; }
thead th { color: var(--soft); font-weight: 600; font-size: 0.8rem; line-height: 1.3; vertical-align: bottom;
  white-space: normal; }
tbody th { font-weight: 400; }
tbody tr:hover > * { background: var(--band); }
tr.strong > * { border-top: 2px solid var(--accent); }
tr.strong th { font-weight: 600; }
td.best { background: var(--tint); }
td.best strong { font-weight: 700; }
figure { margin: 0 0 1.25rem; }
figcaption { color: var(--soft); font-size: 0.8rem; margin-top: -0.85rem; }
.paper { background: #ffffff; }
.paper img { display: block; width: 100%; height: auto; max-width: 68.25rem; margin: 0 auto; }
footer { margin-top: 3rem; padding-top: 1.25rem; border-top: 1px solid var(--line); color: var(--soft);
  font-size: 0.85rem; }
@media (max-width: 40rem) {
  main { padding: 1.5rem 1rem 3rem; }
  .paper img { width: 42rem; max-width: none; }
  th:first-child { max-width: 9.5rem; }
}
@media print {
  :root { --ground: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --band: #fff; --accent: #ad4a00;
    --tint: #f3e3d6; --blue: #000; color-scheme: light; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  section { margin-top: 1.5rem; padding-top: 1rem; }
  h2 { break-after: avoid; }
  figure, .headline, .tiles, tr { break-inside: avoid; }
  .scroll { overflow: visible; border: 0; }
  .paper img { width: 100%; max-width: 100%; max-height: 24cm; object-fit: contain; }
  table { font-size: 7pt; }
  th, td { padding: 1.5pt 3pt; }
  th:first-child { position: static; white-space: normal; }
}
"""
