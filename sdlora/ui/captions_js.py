"""What the caption cards are in the browser: their frame, their look, and the script that builds them.

Texts of files are put in as text, so nothing in a caption can become HTML. A caption is written when its field is left; a field that is
being typed in is never drawn anew.
"""

from sdlora.ui.generate_cards_js import MAKE

HTML = """<section class="set"><div class="welcome"></div><ul class="general"></ul>
<div class="cards" role="list"></div>
<nav class="pages" hidden><button type="button" class="newer"></button><span class="said"></span>
<button type="button" class="older"></button></nav></section>"""

CSS = """
.set { display: flex; flex-direction: column; gap: 10px; color: var(--body-text-color); font-size: 0.875rem; }
.set [hidden] { display: none !important; }
.welcome { padding: 28px; border: 2px dashed var(--border-color-primary); border-radius: 12px; color: var(--body-text-color-subdued); }
.welcome h2 { font-size: 1.15rem; margin: 0 0 10px; color: var(--body-text-color); }
.welcome ol { padding-left: 1.3em; line-height: 1.9; list-style: decimal; margin: 0 0 10px; }
.cards { max-height: 880px; overflow-y: auto; scrollbar-width: thin; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 270px), 1fr)); gap: 10px; }
.card { display: grid; grid-template-columns: 84px 1fr; gap: 10px; padding: 10px; border-radius: 10px; min-width: 0; }
.card { border: 1px solid var(--border-color-primary); background: var(--block-background-fill); }
.card.stops { border-color: #dc2626; } .card.warns { border-color: #d97706; }
.shot { width: 84px; height: 84px; border-radius: 8px; object-fit: cover; background: var(--border-color-primary); }
.body { min-width: 0; display: flex; flex-direction: column; gap: 4px; }
.head { display: flex; gap: 6px; align-items: center; }
.name { flex: 1; font-size: 0.78rem; color: var(--body-text-color-subdued); }
.name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
textarea { width: 100%; box-sizing: border-box; min-height: 56px; resize: vertical; padding: 6px 8px; font: inherit; line-height: 1.35; }
textarea { border: 1px solid var(--border-color-primary); border-radius: 8px; color: var(--body-text-color); }
textarea { background: var(--input-background-fill); }
textarea:focus { outline: 2px solid var(--primary-400); outline-offset: -1px; }
ul { list-style: none; margin: 0; padding: 0; display: flex; flex-direction: column; gap: 4px; }
.finding { font-size: 0.78rem; line-height: 1.35; padding: 3px 8px; border-radius: 4px; overflow-wrap: anywhere; }
.finding { box-shadow: inset 3px 0 0 #3b6fb5; background: var(--background-fill-secondary); }
.finding.stops { box-shadow: inset 3px 0 0 #dc2626; } .finding.warns { box-shadow: inset 3px 0 0 #d97706; }
.card ul { grid-column: 1 / -1; }
button { border: 1px solid var(--border-color-primary); border-radius: 8px; background: var(--button-secondary-background-fill); }
button { color: var(--body-text-color); cursor: pointer; font-size: 0.78rem; padding: 2px 8px; min-height: 28px; }
button:hover { border-color: var(--primary-400); } button:disabled { opacity: 0.45; cursor: default; }
.state { font-size: 0.74rem; color: #15803d; min-height: 1em; } .state.bad { color: #b91c1c; }
.dark & .state { color: #4ade80; } .dark & .state.bad { color: #fca5a5; }
.pages { display: flex; gap: 12px; align-items: center; justify-content: center; color: var(--body-text-color-subdued); }
"""

SCRIPT = (
    MAKE
    + r"""
const [welcome, general, cards, pages, newer, said, older] =
  [".welcome", ".general", ".cards", ".pages", ".newer", ".said", ".older"].map((one) => element.querySelector(one));
const finding = (one) => make("li", "finding " + one.severity, one.what);
const worst = (found) => ["stops", "warns"].find((one) => found.some((each) => each.severity === one)) || "";

const list = make("ol");
for (const step of [texts.welcome_1, texts.welcome_2, texts.welcome_3]) list.append(make("li", "", step));
welcome.append(make("h2", "", texts.welcome_title), list, make("div", "", texts.welcome));
newer.textContent = texts.card_newer;
older.textContent = texts.card_older;

const build = (one) => {
  const card = make("div", "card");
  card.setAttribute("role", "listitem");
  card.dataset.id = one.id;
  const shot = make(one.picture ? "img" : "div", "shot");
  if (one.picture) { shot.src = one.picture; shot.alt = texts.card_alt + " " + one.name; }
  const body = make("div", "body"), head = make("div", "head"), area = make("textarea"), state = make("span", "state");
  const away = make("button", "away", "✕");
  const name = make("span", "name", one.name);
  name.title = one.name;
  away.title = texts.card_remove;
  away.setAttribute("aria-label", texts.card_remove + " " + one.name);
  away.addEventListener("click", () => trigger("delete", { set: props.value.set, picture: one.id }));
  area.rows = 3;
  area.placeholder = texts.card_empty;
  area.setAttribute("aria-label", texts.card_caption + " " + one.name);
  state.setAttribute("role", "status");
  let timer;
  const save = async () => {
    clearTimeout(timer);
    const sent = area.value, told = await server.write([props.value.set, one.id, sent]);
    if (!told && area.value === sent) delete area.dataset.typed;
    state.className = "state" + (told ? " bad" : "");
    state.textContent = told || texts.card_saved;
    return !told;
  };
  area.addEventListener("input", () => {
    area.dataset.typed = "yes";
    state.textContent = "";
    clearTimeout(timer);
    timer = setTimeout(save, 1000);  // a tab may be closed before the caption is left
  });
  area.addEventListener("change", async () => { if (await save()) trigger("submit"); });
  head.append(name, away);
  body.append(head, area, state);
  card.append(shot, body, make("ul"));
  return card;
};
const fill = (card, one) => {
  const area = card.querySelector("textarea");
  if (document.activeElement !== area && !area.dataset.typed) area.value = one.caption;  // an older answer does not undo what was typed
  card.className = "card " + worst(one.findings);
  card.querySelector("ul").replaceChildren(...one.findings.map(finding));
};
const render = () => {
  const now = props.value || {};
  const there = now.pictures || [];
  welcome.hidden = !!there.length;
  general.replaceChildren(...(now.findings || []).map(finding));
  const old = new Map(Array.from(cards.children, (card) => [card.dataset.id, card]));
  const shown = there.map((one) => {
    const card = old.get(one.id) || build(one);
    fill(card, one);
    return card;
  });
  if (shown.length !== cards.children.length || shown.some((card, i) => cards.children[i] !== card)) {
    const typing = document.activeElement, inside = cards.contains(typing);
    cards.replaceChildren(...shown);
    if (inside && cards.contains(typing)) typing.focus();
  }
  pages.hidden = !there.length;
  said.textContent = now.said || "";
  newer.hidden = older.hidden = (now.pages || 1) < 2;
  newer.disabled = now.page <= 1;
  older.disabled = now.page >= now.pages;
};
newer.addEventListener("click", () => trigger("select", { page: props.value.page - 1 }));
older.addEventListener("click", () => trigger("select", { page: props.value.page + 1 }));
watch("value", render);
render();
"""
)
