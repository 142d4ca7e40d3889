"""What the LoRA cards are in the browser: their frame, their look, and the script that builds them.

Texts of files are put in as text, so nothing that a header says can become HTML. The script changes the control's value only when a
person lets a slider go or presses something, so that dragging costs nothing.
"""

HTML = """<section class="loras"><div class="cards" role="list"></div>
<button type="button" class="add" aria-expanded="false"></button>
<div class="picker" hidden><input type="search" class="search"><div class="count" role="status"></div><div class="results"></div></div>
</section>"""

CSS = """
.loras { display: flex; flex-direction: column; gap: 8px; color: var(--body-text-color); font-size: 0.875rem; }
.cards { display: flex; flex-direction: column; gap: 8px; }
.card { display: flex; gap: 10px; padding: 10px; border: 1px solid var(--border-color-primary); border-radius: 10px; }
.card { background: var(--block-background-fill); }
.card.off { opacity: 0.65; }
.card.bad { border-color: #dc2626; }
.shot { width: 64px; height: 64px; flex: none; border-radius: 8px; object-fit: cover; background: var(--border-color-primary); }
.body { flex: 1; min-width: 0; display: flex; flex-direction: column; gap: 6px; }
.head, .knob { display: flex; align-items: center; gap: 8px; flex-wrap: wrap; }
.name { font-weight: 600; overflow-wrap: anywhere; flex: 1; min-width: 6em; }
.badge { font-size: 0.75rem; padding: 1px 8px; border-radius: 999px; border: 1px solid var(--border-color-primary); }
.why { color: #b91c1c; font-size: 0.8rem; overflow-wrap: anywhere; }
.dark & .why { color: #fca5a5; }
.fit { color: var(--body-text-color-subdued); font-size: 0.8rem; overflow-wrap: anywhere; }
.chips { display: flex; flex-wrap: wrap; gap: 4px; }
button { border: 1px solid var(--border-color-primary); border-radius: 8px; background: var(--button-secondary-background-fill); }
button { color: var(--body-text-color); padding: 4px 10px; cursor: pointer; font-size: 0.8rem; min-height: 28px; }
button:hover { border-color: var(--primary-400); }
.chip { padding: 1px 8px; border-radius: 999px; }
.add { padding: 8px; font-size: 0.875rem; }
.knob span { min-width: 7.5em; }
.knob input[type=range] { flex: 1; min-width: 80px; accent-color: var(--primary-600); }
.knob input[type=number] { width: 5.2em; }
input[type=number], input[type=text], input[type=search] { border: 1px solid var(--border-color-primary); border-radius: 8px; }
input[type=number], input[type=text], input[type=search] { background: var(--input-background-fill); color: var(--body-text-color); }
input[type=number], input[type=text], input[type=search] { padding: 4px 8px; font-size: 0.875rem; }
.course { flex: 1; min-width: 8em; }
summary { cursor: pointer; font-size: 0.8rem; }
.picker { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 10px; }
.search { width: 100%; box-sizing: border-box; }
.count { font-size: 0.8rem; color: var(--body-text-color-subdued); margin: 6px 0; }
.results { display: grid; grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)); gap: 8px; max-height: 320px; overflow: auto; }
.result { display: flex; flex-direction: column; gap: 4px; align-items: stretch; text-align: left; padding: 6px; }
.result .shot { width: 100%; height: 84px; }
.results { align-items: start; }
.result .name { flex: none; }
.result .badge { align-self: start; }
.badge.good { border-color: #16a34a; }
.why { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden; }
input[type=checkbox] { appearance: auto; width: 18px; height: 18px; margin: 0; background: none; accent-color: var(--primary-600); }
.result.bad { border-color: #dc2626; }
"""

# How both pages with cards build an element.
MAKE = r"""
const make = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  if (tag === "button") made.type = "button";
  return made;
};
"""

# `texts` and BASE stand before it, see `words.for_script`.
SCRIPT = (
    MAKE
    + r"""
const [cards, add, picker, search, count, results] =
  [".cards", ".add", ".picker", ".search", ".count", ".results"].map((one) => element.querySelector(one));
const base = () => window.sdloraBase || BASE;
const known = new Map();
let asked = 0, drawn = "";
const value = () => JSON.parse(JSON.stringify(props.value || { chosen: [] }));
const put = (change) => { const now = value(); change(now.chosen); drawn = JSON.stringify(now); props.value = now; };
const shot = (facts) => {
  const made = make(facts.picture ? "img" : "div", "shot");
  if (facts.picture) { made.src = facts.picture; made.alt = texts.picture + " " + facts.name; }
  return made;
};
const why = (text) => { const made = make("div", "why", text); made.title = text; return made; };
const badge = (facts) => make("span", "badge", facts.family + (facts.rank ? " · " + texts.rank + " " + facts.rank : ""));

const knob = (label, start, onChange) => {
  const row = make("label", "knob");
  const slide = Object.assign(make("input"), { type: "range", min: -2, max: 2, step: 0.05, value: start });
  const field = Object.assign(make("input"), { type: "number", min: -2, max: 2, step: 0.05, value: start });
  slide.setAttribute("aria-label", label);
  field.setAttribute("aria-label", label);
  slide.addEventListener("input", () => { field.value = slide.value; });
  slide.addEventListener("change", () => onChange(Number(slide.value)));
  field.addEventListener("change", () => {
    const told = Math.min(2, Math.max(-2, Number(field.value) || 0));
    field.value = slide.value = told;
    onChange(told);
  });
  row.append(make("span", "", label), slide, field);
  return row;
};

const insert = (word) => {
  const area = document.querySelector("#prompt textarea");
  if (!area || area.value.split(/\s*,\s*/).includes(word)) return;
  area.value = area.value.trim() ? area.value.trim().replace(/,$/, "") + ", " + word : word;
  area.dispatchEvent(new Event("input", { bubbles: true }));
};

const build = (one, place) => {
  const facts = known.get(one.lora) || { name: one.lora, family: "…" };
  const made = make("div", "card" + (facts.reason ? " bad" : "") + (one.on ? "" : " off"));
  made.setAttribute("role", "listitem");
  made.dataset.lora = facts.name;
  const body = make("div", "body"), head = make("div", "head");
  const on = Object.assign(make("input"), { type: "checkbox", checked: one.on });
  on.setAttribute("aria-label", texts.on + " " + facts.name);
  on.title = texts.on;
  on.addEventListener("change", () => { put((all) => { all[place].on = on.checked; }); render(); });
  const away = make("button", "away", "✕");
  away.setAttribute("aria-label", texts.remove + " " + facts.name);
  away.addEventListener("click", () => { put((all) => all.splice(place, 1)); render(); });
  head.append(on, make("span", "name", facts.name), badge(facts), away);
  body.append(head);
  if (facts.reason) body.append(why(texts.misfit + " " + facts.reason));
  if (facts.fit) body.append(make("div", "fit", facts.fit));
  const chips = make("div", "chips");
  for (const word of facts.trigger || []) {
    const chip = make("button", "chip", word);
    chip.title = texts.trigger;
    chip.addEventListener("click", () => insert(word));
    chips.append(chip);
  }
  if (chips.childElementCount) body.append(chips);
  body.append(knob(texts.strength, one.strength, (told) => put((all) => { all[place].strength = told; })));
  const more = make("details");
  more.append(make("summary", "", texts.more));
  more.open = one.text !== null || !!one.course;
  const text = knob(texts.text, one.text === null ? one.strength : one.text, (told) => put((all) => { all[place].text = told; }));
  const row = make("label", "knob"), course = Object.assign(make("input", "course"), { type: "text", value: one.course });
  course.placeholder = "0.2@0, 1@0.5";
  course.addEventListener("change", () => put((all) => { all[place].course = course.value; }));
  row.append(make("span", "", texts.course), course);
  more.append(text, row);
  body.append(more);
  made.append(shot(facts), body);
  return made;
};

const render = () => {
  const now = value();
  drawn = JSON.stringify(now);
  cards.replaceChildren(...now.chosen.map(build));
};
const learn = async () => {
  const now = value();
  await Promise.all(now.chosen.map(async (one) => known.set(one.lora, await server.look([one.lora, base()]))));
  render();
};
const list = async () => {
  const turn = ++asked;
  const told = await server.find([search.value, base()]);
  if (turn !== asked) return;
  count.textContent = told.count + " " + texts.found;
  results.replaceChildren(...told.loras.map((facts) => {
    const made = make("button", "result" + (facts.reason ? " bad" : ""));
    const marks = (facts.marks || []).map((one) => make("span", "badge good", texts[one]));
    made.append(shot(facts), make("span", "name", facts.name), ...marks, badge(facts));
    if (facts.reason) made.append(why(facts.reason));
    made.addEventListener("click", () => {
      known.set(facts.key, facts);
      if (!value().chosen.some((one) => one.lora === facts.key))
        put((all) => all.push({ lora: facts.key, strength: facts.strength || 1, text: null, on: true, course: "" }));
      open(false);
      render();
      learn();
    });
    return made;
  }));
};
const open = (wanted) => {
  picker.hidden = !wanted;
  add.setAttribute("aria-expanded", String(wanted));
  if (wanted) { search.value = ""; list(); search.focus(); }
};
let timer;
add.textContent = texts.add;
search.placeholder = texts.search;
search.setAttribute("aria-label", texts.search);
add.addEventListener("click", () => open(picker.hidden));
search.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(list, 200); });
picker.addEventListener("keydown", (event) => { if (event.key === "Escape") { open(false); add.focus(); event.stopPropagation(); } });
window.addEventListener("sdlora-base", () => learn());
watch("value", () => { if (JSON.stringify(value()) !== drawn) { render(); learn(); } });
render();
if (value().chosen.length) learn();
"""
)

# The base is another control: a change of it is told to the cards, which then ask anew whether their files fit.
TELL_BASE = """(base) => { window.sdloraBase = base; window.dispatchEvent(new Event("sdlora-base")); }"""
