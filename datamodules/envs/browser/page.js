// Evaluated once after a page has loaded; the object is held by a handle that the page's own scripts don't have.
// Everything that comes from a model arrives as an argument of these functions, never as source.
(() => {
  const STRIPPED = ["data-wob_ref", "data-wob_eps", "data-tampered", "data-recording_target"];
  const HIDDEN_IDS = new Set(["reward-display", "click-canvas", "sync-task-cover", "attention-canvas"]);
  let held = []; // preloaded images stay
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));

  // A submenu opens 300 ms after the mouse is there, by a timer that nothing tells of: it shall not depend on the clock.
  if (window.jQuery?.ui?.menu) window.jQuery.ui.menu.prototype.delay = 0;

  const frame = () => {
    const wrap = document.getElementById("wrap");
    return wrap instanceof HTMLIFrameElement ? wrap : null;
  };
  // The document that the task is in, and where it lies in the window.
  const taskDocument = () => frame()?.contentDocument ?? document;
  const offset = () => {
    const box = frame()?.getBoundingClientRect();
    return box ? [box.left, box.top] : [0, 0];
  };

  const rendered = (element) => element.getClientRects().length > 0;

  const roots = () => {
    const inner = frame();
    if (inner) return inner.contentDocument?.body ? [inner.contentDocument.body] : [];
    const wrap = document.getElementById("wrap");
    const found = wrap ? [wrap] : [];
    // Dialogs, menus and date pickers are put beside the task's own element.
    for (const child of document.body?.children ?? []) {
      if (child === wrap || HIDDEN_IDS.has(child.id) || /^(SCRIPT|STYLE|LINK)$/.test(child.tagName)) continue;
      if (!wrap?.contains(child) && rendered(child)) found.push(child);
    }
    return found;
  };

  // What is a property of a form element and not in its markup is written into the copy that is shown.
  const reflect = (original, copy) => {
    const active = original.ownerDocument.activeElement;
    const sources = [original, ...original.querySelectorAll("*")];
    const copies = [copy, ...copy.querySelectorAll("*")];
    sources.forEach((source, i) => {
      const target = copies[i];
      STRIPPED.forEach((name) => target.removeAttribute(name));
      const tag = source.tagName;
      if (tag === "INPUT") {
        if (source.type === "checkbox" || source.type === "radio") target.toggleAttribute("checked", source.checked);
        else if (source.value !== "") target.setAttribute("value", source.value);
        else target.removeAttribute("value");
      } else if (tag === "TEXTAREA") target.textContent = source.value;
      else if (tag === "OPTION") target.toggleAttribute("selected", source.selected);
      if (source === active && source !== source.ownerDocument.body) target.setAttribute("data-focused", "");
    });
    return copy;
  };

  const html = () =>
    roots().map((root) => reflect(root, root.cloneNode(true)).outerHTML).join("\n");

  const INTERACTIVE = new Set(["A", "BUTTON", "INPUT", "SELECT", "TEXTAREA", "OPTION", "LABEL"]);
  const squeeze = (text) => text.replace(/\s+/g, " ").trim();

  // One line an element: what can be named in an XPath, then what it shows. Leaves and form elements only.
  const compact = () => {
    const lines = [];
    const walk = (element) => {
      if (!(element instanceof (element.ownerDocument.defaultView ?? window).Element)) return;
      if (element.id === "query" || HIDDEN_IDS.has(element.id)) return;
      const tag = element.tagName.toUpperCase();
      if (/^(SCRIPT|STYLE|BR|HR)$/.test(tag)) return;
      if (tag !== "OPTION" && !rendered(element)) return;
      const own = squeeze([...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data).join(" "));
      const leaf = element.children.length === 0;
      if (INTERACTIVE.has(tag) || own || (leaf && (element.id || element instanceof SVGElement))) {
        let line = tag.toLowerCase();
        if (element.id) line += "#" + element.id;
        else if (typeof element.className === "string" && element.className.trim())
          line += "." + element.className.trim().split(/\s+/).slice(0, 2).join(".");
        if (tag === "INPUT" && element.type !== "text") line += "[" + element.type + "]";
        if (element instanceof SVGElement && leaf)
          for (const name of ["x", "y", "cx", "cy", "width", "height", "r", "points", "fill"]) {
            const value = element.getAttribute(name);
            if (value !== null) line += " " + name + "=" + value;
          }
        const text = tag === "INPUT" || tag === "SELECT" || tag === "TEXTAREA" ? "" : own;
        if (text) line += " " + text;
        if (tag === "INPUT" && (element.type === "checkbox" || element.type === "radio"))
          line += element.checked ? " on" : " off";
        else if ((tag === "INPUT" || tag === "TEXTAREA") && element.value) line += " = " + squeeze(element.value);
        else if (tag === "OPTION" && element.selected) line += " on";
        if (element.ownerDocument.activeElement === element) line += " *";
        lines.push(line);
      }
      for (const child of element.children) walk(child);
    };
    roots().forEach(walk);
    return lines.join("\n");
  };

  const here = () => location.href;

  const utterance = () => {
    if (!document.getElementById("query")) return "";
    const value = core.getUtterance();
    if (typeof value === "string") return value;
    return value.utterance ?? JSON.stringify(value);
  };

  const observe = () => {
    try {
      // A click that ends the episode may take the task away: the end is read first.
      const done = WOB_DONE_GLOBAL === true;
      return {
        url: here(), done, reward: done ? WOB_RAW_REWARD_GLOBAL : 0,
        reason: done ? String(WOB_REWARD_REASON ?? "") : "",
        utterance: utterance(), html: done ? "" : html(), page: done ? "" : compact(),
      };
    } catch (error) {
      return { url: here(), lost: String(error).slice(0, 200) };
    }
  };

  const busy = () => {
    const view = taskDocument().defaultView ?? window;
    if (view.jQuery?.timers?.length) return true;
    return view.document.getAnimations().some((a) => a.playState === "running");
  };

  // Wait until animations have ended, at most `limit` ms: what moves can't be hit.
  const settle = async (limit) => {
    const end = performance.now() + limit;
    await pause(0);
    while (!WOB_DONE_GLOBAL && busy() && performance.now() < end) await pause(10);
  };

  const matches = (xpath) => {
    const owner = taskDocument();
    const found = owner.evaluate(xpath, owner, null, XPathResult.ORDERED_NODE_SNAPSHOT_TYPE, null);
    const elements = [];
    for (let i = 0; i < found.snapshotLength; i++) {
      let node = found.snapshotItem(i);
      if (node.nodeType === 3 || node.nodeType === 2) node = node.parentElement ?? node.ownerElement;
      if (node?.nodeType === 1) elements.push(node);
    }
    return elements;
  };

  const inside = (element) => !["reward-display", "sync-task-cover"].some((id) => document.getElementById(id)?.contains(element));

  const resolve = (xpath) => {
    try {
      const elements = matches(xpath).filter(inside);
      return elements.length ? { status: "ok", elements } : { status: "no_match" };
    } catch {
      return { status: "bad_xpath" }; // not an XPath, or one that selects no nodes
    }
  };

  const reachable = (element) => {
    if (!rendered(element)) return null;
    element.scrollIntoView({ block: "nearest", inline: "nearest" });
    const owner = element.ownerDocument;
    const [dx, dy] = offset();
    const boxes = [...element.getClientRects()].filter((box) => box.width > 0 && box.height > 0);
    for (const box of boxes) {
      const x = box.left + box.width / 2, y = box.top + box.height / 2;
      const hit = owner.elementFromPoint(x, y);
      if (hit && (hit === element || element.contains(hit) || hit.contains(element) && hit.tagName === "LABEL"))
        return { x: x + dx, y: y + dy };
    }
    return null;
  };

  const choose = (option) => {
    const list = option.closest("select");
    if (!list) return "not_clickable";
    list.focus();
    if (list.multiple) option.selected = !option.selected;
    else list.value = option.value, option.selected = true;
    list.dispatchEvent(new Event("input", { bubbles: true }));
    list.dispatchEvent(new Event("change", { bubbles: true }));
    return "ok";
  };

  return {
    observe,
    probe(xpath) { return resolve(xpath).status; },
    async reset(seed, mode, limit, settling) {
      core.EPISODE_MAX_TIME = limit;
      if (core.EP_TIMER !== null) core.endEpisode(0);
      document.activeElement?.blur?.();
      Math.seedrandom(seed);
      core.setDataMode(mode);
      core.startEpisodeReal();
      for (let i = 0; i < 500 && !WOB_TASK_READY; i++) await pause(10);
      await settle(settling);
      return observe();
    },
    // Where to put the mouse for an instruction; what needs no mouse is done here.
    aim(kind, xpath) {
      if (WOB_DONE_GLOBAL) return { status: "ok", finished: true };
      const { status, elements } = resolve(xpath);
      if (status !== "ok") return { status };
      if (kind === "clickoption") {
        const option = elements.map((e) => (e.tagName === "OPTION" ? e : null)).find(Boolean);
        return option ? { status: choose(option), handled: true } : { status: "not_clickable" };
      }
      if (kind === "clickxpath" && elements[0].tagName === "OPTION")
        return { status: choose(elements[0]), handled: true };
      // The official agent clicks every match of a <span>; elsewhere the first that can be hit.
      const spans = kind === "clickxpath" && elements.every((e) => e.tagName === "SPAN") && elements.length > 1;
      if (spans) return { status: "ok", count: elements.length };
      for (const element of elements) {
        const point = reachable(element);
        if (point) return { status: "ok", ...point };
      }
      const first = elements.find(rendered);
      if (!first || kind === "movemouse") return { status: "not_clickable" };
      first.focus?.(); // covered by something else: the key then goes to it
      return { status: "ok", enter: true };
    },
    // Images that styles name are fetched beforehand: an icon that changes under the mouse would have no size until
    // its new image is there.
    async preload() {
      const found = new Set();
      for (const sheet of document.styleSheets) {
        for (const rule of sheet.cssRules ?? []) {
          for (const [, url] of rule.cssText.matchAll(/url\("([^")]+)"\)/g)) found.add(new URL(url, sheet.href ?? location.href).href);
        }
      }
      held = [...found].map((url) => Object.assign(new Image(), { src: url }));
      await Promise.all(held.map((image) => image.decode().catch(() => null)));
      return held.length;
    },
    aimAt(xpath, index) { // the index-th match, for instructions that click them all
      if (WOB_DONE_GLOBAL) return null;
      const element = resolve(xpath).elements?.[index];
      return element ? reachable(element) : null;
    },
    async after(settling) {
      await settle(settling);
      return observe();
    },
  };
})()
