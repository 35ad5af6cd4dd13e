"use strict";
// The token viewer: one rollout at a time, every token a focusable coloured span, and a panel about the chosen token.
// All texts of the run go through textContent, never through markup.

function showTokens(data) {
  const find = (id) => document.getElementById(id);
  const [ID, TEXT, STUDENT, TEACHER, SIGNAL, ENTROPY, STUDENT_TOP, TEACHER_TOP] = [0, 1, 2, 3, 4, 5, 6, 7];
  const FINISH = { stop: "ended by itself", stop_string: "ended by a stop string", length: "cut off by the length limit" };
  const SOURCE = { policy: "sampled by the student", data: "from the data set" };
  let rollout = null; // the one that is shown
  let spans = [];
  let chosen = -1;
  let held = -1; // a click holds a token against the pointer
  let limit = data.limit;

  const element = (tag, className, ...children) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.append(...children);
    return made;
  };
  const minus = (text) => text.replace("-", "−");
  const nats = (x, sign = false) => (x === null ? "–" : (sign && x > 0 ? "+" : "") + minus(x.toFixed(Math.abs(x) < 0.1 ? 4 : 3)));
  const share = (p) => {
    if (p === null) return "–";
    if (p > 0 && p < 0.0001) return "<0.01%";
    return (100 * p).toFixed(p < 0.1 ? 2 : 1) + "%";
  };

  // Spaces, line ends and characters that would change the page's flow are made visible.
  const NAMED = { " ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍" };
  const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
  const code = (c) => `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
  const visible = (text) =>
    text === "" ? "⟨empty⟩" : text.replace(/^ +| +$|[\n\t\r]/g, (s) => [...s].map((c) => NAMED[c]).join("")).replace(HIDDEN, code);

  function flow(text) {
    if (text === "") return [element("i", "", "·")];
    if (/^ +$/.test(text)) return [element("i", "", "␣".repeat(text.length))];
    return text.split(/([\n\r\t])/).flatMap((part) => {
      if (part === "\n") return [element("i", "", "↵"), "\n"];
      if (part === "\r" || part === "\t") return [element("i", "", NAMED[part])];
      return part ? [part.replace(HIDDEN, code)] : [];
    });
  }

  function paint(node, signal) {
    node.classList.toggle("none", signal === null);
    const size = signal === null ? 0 : Math.min(Math.abs(signal) / limit, 1);
    node.style.setProperty("--s", size.toFixed(3));
    node.style.setProperty("--c", signal > 0 ? "var(--favour)" : "var(--disfavour)");
  }

  function verdict(signal) {
    if (signal === null || signal === 0) return "";
    return signal > 0 ? " teacher favours" : " teacher disfavours";
  }

  function topList(title, className, colour, top, other, sampled, logp) {
    const box = element("div", "", element("h4", className, title));
    const shared = new Set(other.filter((_, i) => i % 2 === 0));
    let mark = -1; // two ids may share a text: the sampled one has the sampled token's probability
    for (let i = 0; i < top.length; i += 2) {
      if (top[i] !== sampled || logp === null) continue;
      const off = (j) => Math.abs(top[j + 1] - Math.exp(logp));
      if (mark < 0 || off(i) < off(mark)) mark = i;
    }
    for (let i = 0; i < top.length; i += 2) {
      const text = visible(data.texts[top[i]]);
      const name = element("span", "", text);
      name.title = text;
      const bar = element("i", shared.has(top[i]) ? "" : "alone");
      bar.style.width = `${(100 * Math.min(top[i + 1], 1)).toFixed(2)}%`;
      bar.style.setProperty("--c", `var(--${colour})`);
      box.append(element("div", i === mark ? "top-row sampled" : "top-row", name, element("span", "", share(top[i + 1])), element("span", "meter", bar)));
    }
    if (!top.length) box.append(element("p", "fine", "not recorded"));
    return box;
  }

  function inspect(index) {
    const token = rollout.tokens[index];
    const probability = (x) => share(x === null ? null : Math.exp(x));
    const cell = (text) => element("td", "", text);
    const head = (text, className = "") => element("th", className, text);
    const scores = element("table", "",
      element("thead", "", element("tr", "", head(""), head("Student", "of-student"), head("Teacher", "of-teacher"))),
      element("tbody", "",
        element("tr", "", head("Probability"), cell(probability(token[STUDENT])), cell(probability(token[TEACHER]))),
        element("tr", "", head("Log-prob, nats"), cell(nats(token[STUDENT])), cell(nats(token[TEACHER])))));
    const swatch = element("i", "swatch");
    paint(swatch, token[SIGNAL]);
    const signal = element("td", "", swatch, `${nats(token[SIGNAL], true)} nats`, element("small", "", verdict(token[SIGNAL])));
    const single = element("table", "", element("tbody", "",
      element("tr", "", head("Signal"), signal),
      element("tr", "", head("Student's entropy"), cell(`${nats(token[ENTROPY])} nats`))));
    const tops = element("div", "tops",
      topList("Student's top tokens", "of-student", "student", token[STUDENT_TOP], token[TEACHER_TOP], token[TEXT], token[STUDENT]),
      topList("Teacher's top tokens", "of-teacher", "teacher", token[TEACHER_TOP], token[STUDENT_TOP], token[TEXT], token[TEACHER]));
    const where = `id ${token[ID]}, token ${index + 1} of ${rollout.tokens.length}${held >= 0 ? ", held: Esc lets go" : ""}`;
    const key = "Underlined: the token that was written. Hollow bar: not in the other model's list.";
    find("inspector").replaceChildren(
      element("p", "name", visible(data.texts[token[TEXT]])), element("p", "where", where), scores, single, tops, element("p", "fine", key));
  }

  function choose(index, { focus = false } = {}) {
    if (spans[chosen]) {
      spans[chosen].classList.remove("on");
      spans[chosen].tabIndex = -1;
      spans[chosen].setAttribute("aria-selected", "false");
    }
    chosen = index;
    const span = spans[index];
    span.classList.add("on");
    span.tabIndex = 0;
    span.setAttribute("aria-selected", "true");
    if (focus) span.focus();
    inspect(index);
  }

  function rescale() {
    const sizes = rollout.tokens.map((t) => Math.abs(t[SIGNAL] ?? 0));
    limit = find("scale").value === "rollout" ? Math.max(...sizes, 0) || 1 : data.limit;
    spans.forEach((span, i) => paint(span, rollout.tokens[i][SIGNAL]));
    const more = find("scale").value === "rollout" ? ["", ""] : ["≤ ", "≥ "];
    find("legend-min").textContent = `${more[0]}−${limit.toFixed(2)}`;
    find("legend-max").textContent = `${more[1]}+${limit.toFixed(2)} nats`;
    if (chosen >= 0) inspect(chosen);
  }

  function facts() {
    const fact = (name, value, className = "") => element("li", className, `${name} `, element("b", "", value));
    const list = [];
    if (rollout.correct !== null) list.push(element("li", rollout.correct ? "good" : "bad", rollout.correct ? "✓ correct" : "✗ wrong"));
    if (rollout.reward !== null) list.push(fact("reward", minus(String(+rollout.reward.toFixed(4)))));
    if (rollout.finish) list.push(element("li", "", FINISH[rollout.finish] ?? rollout.finish));
    list.push(element("li", "", SOURCE[rollout.source] ?? rollout.source));
    if (rollout.domain !== "default") list.push(fact("domain", rollout.domain));
    list.push(fact("tokens", String(rollout.length)));
    const mean = rollout.source === "policy" ? "mean reverse KL" : "mean log-ratio student to teacher";
    if (rollout.reverse_kl !== null) list.push(fact(mean, `${nats(rollout.reverse_kl)} nats/token`));
    const signals = rollout.tokens.map((t) => t[SIGNAL]).filter((s) => s !== null);
    if (signals.length) list.push(fact("signal", `${nats(Math.min(...signals), true)} to ${nats(Math.max(...signals), true)} nats`));
    find("facts").replaceChildren(...list);
  }

  function show() {
    const kept = data.steps[find("step").selectedIndex];
    rollout = kept.rollouts[find("rollout").selectedIndex];
    chosen = -1;
    held = -1;
    facts();
    find("prompt").textContent = rollout.prompt.replace(HIDDEN, code);
    spans = rollout.tokens.map((token, index) => {
      const span = element("span", "tok", ...flow(data.texts[token[TEXT]]));
      span.setAttribute("role", "option");
      span.setAttribute("aria-label", `${visible(data.texts[token[TEXT]])}, signal ${nats(token[SIGNAL], true)} nats`);
      span.tabIndex = -1;
      span.dataset.index = index;
      return span;
    });
    find("response").replaceChildren(...(spans.length ? spans : [rollout.text.replace(HIDDEN, code)]));
    find("inspector").replaceChildren(element("p", "fine", "This rollout has no scored tokens."));
    rescale();
    if (spans.length) {
      const sizes = rollout.tokens.map((t) => Math.abs(t[SIGNAL] ?? 0));
      choose(sizes.indexOf(Math.max(...sizes))); // the strongest signal is what one wants to see first
    }
    for (const name of ["step", "rollout"]) {
      find(`${name}-back`).disabled = find(name).selectedIndex === 0;
      find(`${name}-on`).disabled = find(name).selectedIndex === find(name).length - 1;
    }
  }

  function fillRollouts() {
    const before = Math.max(find("rollout").selectedIndex, 0);
    const rollouts = data.steps[find("step").selectedIndex].rollouts;
    const label = (r, i) => `${i + 1} of ${rollouts.length}${r.correct === null ? "" : r.correct ? "  ✓" : "  ✗"}`;
    find("rollout").replaceChildren(...rollouts.map((r, i) => new Option(label(r, i), i)));
    find("rollout").selectedIndex = Math.min(before, rollouts.length - 1);
    show();
  }

  const indexOf = (event) => {
    const span = event.target instanceof Element ? event.target.closest(".tok") : null;
    return span ? Number(span.dataset.index) : -1;
  };
  const response = find("response");
  response.addEventListener("pointerover", (event) => {
    if (held < 0 && indexOf(event) >= 0) choose(indexOf(event));
  });
  response.addEventListener("focusin", (event) => {
    if (indexOf(event) >= 0 && indexOf(event) !== chosen) choose(indexOf(event));
  });
  response.addEventListener("click", (event) => {
    if (indexOf(event) < 0) return;
    held = held === indexOf(event) ? -1 : indexOf(event);
    choose(indexOf(event), { focus: true });
  });
  response.addEventListener("keydown", (event) => {
    const last = spans.length - 1;
    const to = { ArrowRight: chosen + 1, ArrowDown: chosen + 1, ArrowLeft: chosen - 1, ArrowUp: chosen - 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape" && held >= 0) {
      held = -1;
      inspect(chosen);
    }
    if (to === undefined || chosen < 0) return;
    event.preventDefault();
    const next = Math.min(Math.max(to, 0), last);
    if (held >= 0) held = next;
    choose(next, { focus: true });
  });

  find("step").replaceChildren(...data.steps.map((k) => new Option(`step ${k.step}`, k.step)));
  find("step").selectedIndex = data.steps.length - 1;
  find("step").addEventListener("change", fillRollouts);
  find("rollout").addEventListener("change", show);
  find("scale").addEventListener("change", rescale);
  for (const [name, by] of [["step", fillRollouts], ["rollout", show]]) {
    for (const [way, delta] of [["back", -1], ["on", 1]]) {
      find(`${name}-${way}`).addEventListener("click", () => {
        find(name).selectedIndex += delta;
        by();
      });
    }
  }
  fillRollouts();
}
