"""The style sheet of reports and summaries: light and dark, on screen and on paper, no outside resource."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--paper:#fbfbf9;--card:#fff;--ink:#1d2126;--soft:#5a636e;--line:#dfe2e5;--head:#f2f3f1;
--ok:#1f7a4d;--ok-tint:#e2f2e8;--bad:#b3261e;--bad-tint:#fbe6e3;--open:#8a5a00;--open-tint:#fbeed3;--none:#5a636e;
--none-tint:#eceef0;--fresh:#2457a6;--anchor:#8a6fae;--bar:#8fb0dd;--base:#b9c0c8;--worst:#d08770}
@media(prefers-color-scheme:dark){:root{--paper:#14171a;--card:#1b1f24;--ink:#e6e9ec;--soft:#9aa4af;--line:#30363d;
--head:#22272d;--ok:#6cc795;--ok-tint:#173626;--bad:#ff8f85;--bad-tint:#45201d;--open:#e9b95a;--open-tint:#3d2f10;
--none:#9aa4af;--none-tint:#2a3037;--fresh:#7fb0f5;--anchor:#bda6dc;--bar:#3f6296;--base:#4a525b;--worst:#9c5a44}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;overflow-wrap:break-word}
main{max-width:1080px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:1.9rem;line-height:1.2;margin:4px 0 8px}
h2{font-size:1.25rem;margin:44px 0 4px;padding-top:10px;border-top:2px solid var(--line)}
h3{font-size:1rem;margin:0;line-height:1.35}
p{margin:6px 0;max-width:74ch}
a{color:var(--fresh)}
.soft,.kicker{color:var(--soft)}
.kicker{font-size:.9rem}
.small{font-size:.875rem}
code,.mono{overflow-wrap:anywhere;font:.8125rem/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--head);padding:10px 14px;border-radius:6px;overflow-x:auto;white-space:pre-wrap}
.verdict{display:grid;grid-template-columns:auto 1fr;gap:4px 20px;align-items:center;margin:20px 0;padding:18px 22px;
border-radius:10px;border:1px solid}
.verdict strong{font-size:1.5rem;letter-spacing:.02em}
.verdict p{margin:0;max-width:none}
.pass{color:var(--ok);background:var(--ok-tint);border-color:var(--ok)}
.fail{color:var(--bad);background:var(--bad-tint);border-color:var(--bad)}
.uncertain,.inconclusive{color:var(--open);background:var(--open-tint);border-color:var(--open)}
.undefined,.unjudged,.not_applicable{color:var(--none);background:var(--none-tint);border-color:var(--none)}
.verdict p{color:var(--ink)}
.badge{display:inline-block;padding:1px 9px;border-radius:99px;font-size:.8125rem;font-weight:600;white-space:nowrap}
.unsigned{border:2px dashed var(--open);border-radius:10px;padding:12px 22px;margin:20px 0}
.unsigned strong{display:block;font-size:1.7rem;letter-spacing:.08em;color:var(--open)}
.tiles{display:grid;grid-template-columns:repeat(5,1fr);gap:10px;margin:20px 0}
.tile{display:block;background:var(--card);border:1px solid var(--line);border-top:4px solid var(--none);
border-radius:8px;padding:10px 12px;color:inherit;text-decoration:none;overflow-wrap:anywhere}
.tile.ok{border-top-color:var(--ok)}.tile.bad{border-top-color:var(--bad)}.tile.open{border-top-color:var(--open)}
.tile b{display:block}.tile span{display:block;font-size:.8125rem;color:var(--soft)}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;margin:10px 0;font-size:.9375rem}
th,td{text-align:left;vertical-align:top;padding:9px 12px 9px 0;border-bottom:1px solid var(--line)}
th{font-weight:600;color:var(--soft);font-size:.8125rem}
td.num,th.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tr.watch td{background:var(--head)}
td:first-child,th:first-child{padding-left:8px}
.gates td:first-child{min-width:180px}
.gates .plot{width:320px}
.gates .plot .small{font-size:.75rem}.gates .plot span{white-space:nowrap}
.figure{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:14px 18px;margin:12px 0;
break-inside:avoid}
.figure header{display:flex;gap:6px 12px;align-items:baseline;flex-wrap:wrap}
.figure header .mono{color:var(--soft);margin-left:auto}
.figure .big{font-size:1.5rem;font-variant-numeric:tabular-nums;line-height:1.3}
.figure .big small{font-size:.9375rem;color:var(--soft)}
.two{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:4px 28px;align-items:start}
.two.one{grid-template-columns:1fr}
.conditions{display:grid;grid-template-columns:minmax(0,11fr) minmax(60px,10fr) auto;gap:3px 10px;align-items:center;
font-size:.8125rem;margin-top:6px;line-height:1.3}
.conditions .num{text-align:right;font-variant-numeric:tabular-nums}
.conditions.short{max-width:700px}
.conditions .base{color:var(--soft);font-style:italic}
.conditions .head{grid-column:1/-1;color:var(--soft);margin-top:4px}
svg text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:var(--soft)}
svg text.limit{fill:var(--ink);font-weight:600}
svg.intervals,svg.trajectory{display:block;max-width:100%;height:auto}
svg.bars{display:block;width:100%;height:12px}
.holds{fill:var(--ok);opacity:.11}
.axis{stroke:var(--base);stroke-width:1;vector-effect:non-scaling-stroke}
.tau{stroke:var(--ink);stroke-width:1.4;stroke-dasharray:4 3}
.mark{fill:var(--fresh);stroke:var(--fresh)}
.mark.second{fill:var(--card);stroke:var(--anchor);stroke-width:1.6}
path.mark{fill:none!important;stroke-width:1.8}
path.mark.line{opacity:.45;stroke-width:1.4}
.fill{fill:var(--bar)}.fill.worst{fill:var(--worst)}.fill.base{fill:var(--base)}
.key{max-width:none;display:flex;gap:20px;flex-wrap:wrap;font-size:.8125rem;color:var(--soft);margin:6px 0 0}
.key i{display:inline-block;width:11px;height:11px;border-radius:50%;vertical-align:-1px;margin-right:6px}
.key i.fresh{background:var(--fresh)}.key i.anchor{border:2px solid var(--anchor)}
.key i.tau{border-radius:0;width:18px;height:0;border-top:2px dashed var(--ink);vertical-align:4px}
.key i.holds{border-radius:2px;background:var(--ok);opacity:.3}
.alarm{border-left:4px solid var(--open);padding-left:10px;color:var(--open)}
dl{display:grid;grid-template-columns:190px minmax(0,1fr);gap:6px 18px;margin:10px 0}
dt{color:var(--soft)}ul{margin:0;padding-left:1.2em}dd{margin:0}
.moved{font-weight:700}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:0 14px}
.equal td:first-child{width:34%}
.equal svg.bars{max-width:150px}
.rounds td:first-child{white-space:nowrap}
@media(max-width:760px){main{padding:20px 14px 48px}.tiles{grid-template-columns:repeat(2,1fr)}
.two{grid-template-columns:1fr}dl{grid-template-columns:1fr}dd{margin-bottom:6px}.verdict{grid-template-columns:1fr}}
@media print{:root{--paper:#fff;--card:#fff;--ink:#000}main{max-width:none;padding:0}a{color:inherit}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}h2{break-after:avoid}tr{break-inside:avoid}}
"""


def document(title: str, body: str) -> str:
    """A whole page; ``title`` and ``body`` are markup that was escaped already."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        # nothing is loaded and no script runs, whatever a report quotes
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )
