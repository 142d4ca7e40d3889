"""The look: one column on a phone, two charts abreast on a desk, dark where the reader's system is, black on white on paper."""

STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf7;--card:#fff;--ink:#26242b;--faint:#67636f;--rule:#e4e0d8;--accent:#00639c;
--good:#e8f3ec;--good-edge:#2c8a57;--bad:#fdf0dc;--bad-edge:#c9770a;
--line-0:#0072b2;--line-1:#d55e00;--line-2:#00875f;--line-3:#a94f93}
@media(prefers-color-scheme:dark){:root{--paper:#17161a;--card:#201f24;--ink:#e9e6ec;--faint:#a5a0ad;--rule:#37353d;--accent:#7cc4f5;
--good:#17291f;--good-edge:#4fb980;--bad:#33260f;--bad-edge:#e8a33d;
--line-0:#56b4e9;--line-1:#f39a58;--line-2:#3fc79c;--line-3:#e29aca}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
header,main{max-width:1040px;margin:0 auto;padding:0 20px}
header{padding-top:36px}main{padding-bottom:64px}
h1{font-size:2rem;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:1.35rem;line-height:1.3;margin:0 0 .5em}
h3{font-size:1rem;margin:0 0 .4em}
p,ul,ol{margin:.5em 0;max-width:46em}li{margin:.35em 0}
.lead{font-size:1.05rem;color:var(--faint);margin:.4em 0 1.4em}
.faint,figcaption{color:var(--faint);font-size:.92rem}
code{font:.92em ui-monospace,"Cascadia Mono",Menlo,Consolas,monospace;background:color-mix(in srgb,var(--ink) 8%,transparent);
padding:.1em .35em;border-radius:4px;overflow-wrap:anywhere}
.box{border-left:6px solid;border-radius:8px;padding:18px 22px;margin:0 0 18px}
.box h2{font-size:.85rem;text-transform:uppercase;letter-spacing:.06em;margin:0 0 .4em}
.box p{margin:.3em 0 0;max-width:none}.box p:first-of-type{font-size:1.22rem;line-height:1.45}
.advice{background:var(--good);border-color:var(--good-edge)}.advice h2{color:var(--good-edge)}
.warning{background:var(--bad);border-color:var(--bad-edge)}.warning h2{color:var(--bad-edge)}
nav{display:flex;flex-wrap:wrap;gap:6px 18px;margin:26px 0 0;padding:12px 0;border-block:1px solid var(--rule);font-size:.95rem}
a{color:var(--accent);text-decoration:none}a:hover{text-decoration:underline}
section{margin-top:38px;scroll-margin-top:12px}
figure{margin:18px 0}
.scroll{overflow-x:auto}
.wide figcaption{margin-top:8px}
.wide img{display:block;width:100%;min-width:min(760px,100vw*3);height:auto;border-radius:8px;border:1px solid var(--rule)}
.strip figcaption{margin-bottom:8px;color:var(--ink)}
.cells{display:grid;grid-template-columns:repeat(auto-fill,minmax(132px,1fr));gap:14px 12px}
.cell{font-size:.88rem;color:var(--faint);min-width:0}
.cell img{display:block;width:100%;height:auto;border-radius:6px;margin-bottom:4px}
.marked{color:var(--ink)}.marked img{outline:3px solid var(--good-edge);outline-offset:2px}
.badge{display:inline-block;background:var(--good-edge);color:var(--card);border-radius:9px;padding:0 8px;font-size:.8rem;font-weight:600}
.missing{display:grid;place-items:center;min-height:90px;padding:8px;text-align:center;border:1px dashed var(--faint);border-radius:6px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:18px}
.charts figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:16px 16px 12px}
.chart{display:block;height:auto;margin-bottom:6px}
table{border-collapse:collapse;font-size:.93rem;width:100%}
th,td{text-align:left;vertical-align:top;padding:7px 14px 7px 0;border-bottom:1px solid var(--rule)}
td:last-child,th:last-child{padding-right:0}
th{color:var(--faint);font-weight:600}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
details{margin:14px 0}summary{cursor:pointer;color:var(--accent);padding:6px 0}
@media(max-width:560px){th,td{padding-right:10px}
.wordy thead{display:none}.wordy tr{display:block;padding:8px 0;border-bottom:1px solid var(--rule)}
.wordy td{display:block;border:0;padding:1px 0}.wordy td:last-child{color:var(--faint)}
header{padding-top:22px}header,main{padding-inline:14px}h1{font-size:1.6rem}.box{padding:14px 16px}
.box p:first-of-type{font-size:1.1rem}.charts figure{padding:12px 10px 10px}}
@media print{:root{--paper:#fff;--card:#fff;--ink:#000;--faint:#444;--rule:#bbb;--good:#fff;--bad:#fff;
--good-edge:#2c8a57;--bad-edge:#c9770a;--line-0:#0072b2;--line-1:#d55e00;--line-2:#00875f;--line-3:#a94f93}
body{font-size:11pt}header,main{max-width:none;padding:0}nav{display:none}.wide figcaption{margin-top:8px}
.wide img{min-width:0}.scroll{overflow:visible}
figure,.box,tr{break-inside:avoid}h2,h3{break-after:avoid}.box{border-style:solid;border-width:1px 1px 1px 6px}
.cells{grid-template-columns:repeat(auto-fill,minmax(96px,1fr))}
.charts{grid-template-columns:1fr 1fr}details::details-content{content-visibility:visible;block-size:auto}}
"""
