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
  if (board) {
    const body = board.tBodies[0];
    const heads = [...board.tHead.rows[0].cells];
    const value = (row, place) => {
      const text = row.cells[place].dataset.value;
      return text === undefined || text === "" ? null : heads[place].dataset.kind === "number" ? Number(text) : text;
    };
    heads.forEach((head, place) => head.querySelector("button").addEventListener("click", () => {
      const first = head.dataset.first || "ascending";
      const order = head.getAttribute("aria-sort") === first
        ? (first === "ascending" ? "descending" : "ascending") : first;
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...body.rows].map((row, index) => ({ row, index, key: value(row, place) }));
      rows.sort((a, b) => {
        if (a.key === null || b.key === null) return (a.key === null) - (b.key === null) || a.index - b.index;
        const by = typeof a.key === "number" ? a.key - b.key : a.key.localeCompare(b.key, "en", { numeric: true });
        return sign * by || a.index - b.index;
      });
      body.append(...rows.map((entry) => entry.row));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      said.textContent = `Sorted by ${head.querySelector("button").textContent.trim()}, ${order}.`;
    }));
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
