"use strict";
(() => {
  const root = document.documentElement;
  const stored = { get() { try { return localStorage.getItem("kvbench-theme"); } catch { return null; } },
                   set(value) { try { localStorage.setItem("kvbench-theme", value); } catch { /* not kept */ } } };
  const button = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
  const show = () => { button.textContent = isDark() ? "Light mode" : "Dark mode"; };
  if (["light", "dark"].includes(stored.get())) root.dataset.theme = stored.get();
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    stored.set(root.dataset.theme);
    show();
  });
  dark.addEventListener("change", show);
  show();

  const board = document.getElementById("board");
  const said = document.getElementById("said");
  const at = (id) => document.getElementById(id);
  if (board) {
    const heads = [...board.tHead.rows[0].cells];
    const groups = [...board.tBodies];
    const runs = (body) => [...body.rows].filter((row) => !row.classList.contains("group"));
    const initial = groups.map(runs);
    const value = (row, place) => {
      const text = row.cells[place].dataset.value;
      return text === undefined || text === "" ? null : heads[place].dataset.kind === "number" ? Number(text) : text;
    };
    // Within each task and length: rows of different tasks are never ranked together.
    const sort = (place, order) => {
      const sign = order === "ascending" ? 1 : -1;
      groups.forEach((body) => {
        const rows = runs(body).map((row, index) => ({ row, index, key: value(row, place) }));
        rows.sort((a, b) => {
          if (a.key === null || b.key === null) return (a.key === null) - (b.key === null) || a.index - b.index;
          const by = typeof a.key === "number" ? a.key - b.key : a.key.localeCompare(b.key, "en", { numeric: true });
          return sign * by || a.index - b.index;
        });
        body.append(...rows.map((entry) => entry.row));
      });
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      heads[place].setAttribute("aria-sort", order);
      said.textContent = `Sorted by ${heads[place].querySelector("button").textContent.trim()}, ${order}.`;
    };
    heads.forEach((head, place) => head.querySelector("button").addEventListener("click", () => {
      const first = head.dataset.first || "ascending";
      sort(place, head.getAttribute("aria-sort") === first ? (first === "ascending" ? "descending" : "ascending") : first);
    }));
    const find = at("board-find"), group = at("board-group"), all = at("board-all"), by = at("board-sort");
    const filter = () => {
      const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      groups.forEach((body) => {
        const title = body.rows[0].textContent.toLowerCase();
        let mine = 0;
        runs(body).forEach((row) => {
          const text = `${title} ${row.textContent.toLowerCase()}`;
          row.hidden = !words.every((word) => text.includes(word));
          mine += !row.hidden;
        });
        body.hidden = !mine || (group.value !== "" && group.value !== body.dataset.group);
        if (!body.hidden) shown += mine;
      });
      said.textContent = `${shown} runs shown.`;
    };
    at("board-tools").hidden = false;
    find.addEventListener("input", filter);
    group.addEventListener("change", filter);
    all.addEventListener("change", () => board.classList.toggle("all", all.checked));
    by.addEventListener("change", () => {
      if (by.value !== "") return sort(Number(by.value), heads[by.value].dataset.first);
      groups.forEach((body, place) => body.append(...initial[place]));
      heads.forEach((head) => head.removeAttribute("aria-sort"));
    });
  }

  const data = at("examples-data");
  if (data) {
    const PORTION = 10;
    const settings = JSON.parse(data.textContent);
    const group = at("examples-group"), find = at("examples-find"), names = at("examples-runs");
    const differ = at("examples-differ"), list = at("examples-list"), more = at("examples-more");
    const element = (name, kind, text) => {
      const made = document.createElement(name);
      if (kind) made.className = kind;
      if (text !== undefined) made.textContent = text;
      return made;
    };
    const marked = (place, text, word) => {
      if (!word) return place.append(text);
      const lower = text.toLowerCase();
      let from = 0;
      for (let at = lower.indexOf(word); at >= 0; at = lower.indexOf(word, from)) {
        place.append(text.slice(from, at), element("mark", "", text.slice(at, at + word.length)));
        from = at + word.length;
      }
      place.append(text.slice(from));
    };
    const said = (title, text, word) => {
      const line = element("p");
      line.append(element("strong", "", `${title}: `));
      marked(line, text, word);
      return line;
    };
    const card = (setting, example, chosen, word) => {
      const box = element("article", "example");
      box.append(element("h3", "", example.id));
      if (example.references.length) box.append(said("Reference", example.references.join(" | "), word));
      if (example.info) box.append(said("About", example.info, word));
      const prompt = element("details");
      prompt.append(element("summary", "", "Prompt"));
      const text = element("pre");
      marked(text, example.prompt || "Not kept: an earlier version of kvbench made these runs.", word);
      prompt.append(text);
      prompt.open = Boolean(word) && example.prompt.toLowerCase().includes(word);
      box.append(prompt);
      const answers = element("div", "answers");
      for (const [place, score, answer] of example.answers) {
        if (!chosen(setting.runs[place])) continue;
        const one = element("section", "answer");
        const head = element("h4", "", setting.runs[place]);
        head.append(element("span", score >= 0.999 ? "better" : score <= 0.001 ? "worse" : "", `${Math.round(1000 * score) / 10}%`));
        const said = element("pre");
        marked(said, answer || "(nothing)", word);
        one.append(head, said);
        answers.append(one);
      }
      box.append(answers);
      return box;
    };
    let found = [], shown = 0;
    const extend = () => {
      const setting = settings[group.value];
      const word = find.value.trim().toLowerCase();
      const wanted = names.value.toLowerCase().split(",").map((name) => name.trim()).filter(Boolean);
      const chosen = (name) => !wanted.length || wanted.some((one) => name.toLowerCase().includes(one));
      list.append(...found.slice(shown, shown + PORTION).map((example) => card(setting, example, chosen, word)));
      shown = Math.min(shown + PORTION, found.length);
      more.hidden = shown >= found.length;
    };
    const search = () => {
      const setting = settings[group.value];
      const word = find.value.trim().toLowerCase();
      found = setting.examples.filter((example) => {
        const scores = example.answers.map((one) => one[1]);
        if (differ.checked && Math.max(...scores) === Math.min(...scores)) return false;
        const texts = [example.id, example.prompt, example.info, ...example.references, ...example.answers.map((one) => one[2])];
        return !word || texts.some((text) => text.toLowerCase().includes(word));
      });
      shown = 0;
      list.replaceChildren();
      at("examples-count").textContent = `${found.length} of ${setting.examples.length} examples` +
        (setting.left_out ? `; ${setting.left_out} more, in which the scores differ least, are in the runs' files.` : ".");
      extend();
    };
    at("examples-without").hidden = true;
    at("examples-tools").hidden = false;
    [find, names].forEach((field) => field.addEventListener("input", search));
    [group, differ].forEach((field) => field.addEventListener("change", search));
    more.addEventListener("click", extend);
    search();
  }

  document.querySelectorAll(".command").forEach((block) => {
    const copy = document.createElement("button");
    copy.type = "button";
    copy.textContent = "Copy";
    copy.setAttribute("aria-label", "Copy the command");
    copy.addEventListener("click", async () => {
      const text = block.querySelector("pre").textContent;
      try {
        await navigator.clipboard.writeText(text);
        copy.textContent = "Copied";
        said.textContent = "Command copied.";
      } catch {
        getSelection().selectAllChildren(block.querySelector("pre"));
        copy.textContent = "Selected";
        said.textContent = "Command selected.";
      }
    });
    block.append(copy);
  });

  const open = () => {
    let place = location.hash.length > 1 ? document.getElementById(decodeURIComponent(location.hash.slice(1))) : null;
    for (; place; place = place.parentElement) if (place.tagName === "DETAILS") place.open = true;
  };
  addEventListener("hashchange", open);
  open();
})();
