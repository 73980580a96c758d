// The dashboard: asks the daemon every second and shows what it says. Texts from outside only ever become textContent.
// Money arrives as decimal text and is shown as text; it becomes a number only to place a point in the chart or a bar.
"use strict";

const POLL_MS = 1000;
const WAIT_MAX_MS = 10000;
const ROWS_MAX = 50;
const POINTS_MAX = 300;
const GOOD = new Set(["active", "confirmed", "flowing", "connected"]);
const BAD = new Set(["frozen", "exhausted", "escalated", "declined", "away", "late"]);
const points = [];
let wait = POLL_MS;
let timer = 0;
let before = null;

const at = (id) => document.getElementById(id);

function say(id, text) {
  const place = at(id);
  if (place.textContent !== text) place.textContent = text;
}

function make(tag, text, kind) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  return element;
}

function words(text) {
  return String(text).replaceAll("_", " ");
}

function state(word) {
  const kind = GOOD.has(word) ? "good" : BAD.has(word) ? "bad" : "warn";
  return make("span", words(word), `word ${kind}`);
}

// At most six decimals, cut and never rounded; what was cut off stands in the title.
function money(text) {
  if (text === null || text === undefined) return "–";
  const [whole, decimals = ""] = String(text).split(".");
  const grouped = whole.replace(/\B(?=(\d{3})+$)/g, "\u202f");
  return decimals ? `${grouped}.${decimals.slice(0, 6)}` : grouped;
}

function ago(text) {
  if (!text) return "never";
  const seconds = Math.max(0, Math.round((Date.now() - Date.parse(text)) / 1000));
  if (seconds < 60) return `${seconds} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  return seconds < 172800 ? `${Math.floor(seconds / 3600)} h ago` : `${Math.floor(seconds / 86400)} d ago`;
}

function clock(text) {
  return text ? new Date(text).toLocaleTimeString() : "";
}

function cell(content, kind) {
  const td = make("td", undefined, kind);
  if (content instanceof Node) td.append(content);
  else td.textContent = content;
  return td;
}

function rows(id, items, row, empty) {
  const body = at(id);
  const made = items.slice(0, ROWS_MAX).map((item) => {
    const tr = make("tr");
    tr.append(...row(item));
    return tr;
  });
  if (made.length === 0) {
    const tr = make("tr");
    const td = cell(empty, "none");
    td.colSpan = 8;
    tr.append(td);
    made.push(tr);
  }
  body.replaceChildren(...made);
}

async function ask(path) {
  const token = sessionStorage.getItem("token");
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const response = await fetch(path, { headers, cache: "no-store", signal: AbortSignal.timeout(5000) });
  const body = await response.json();
  if (!response.ok) {
    const error = new Error(body.detail || response.statusText);
    error.status = response.status;
    throw error;
  }
  return body;
}

function showTotals(status) {
  const totals = status.totals;
  for (const name of ["accrued", "released", "unsettled", "headroom"]) {
    say(name, money(totals[name]));
    at(name).title = `${totals[name]} USDC`;
  }
  say("last-release", `last one ${ago(status.flow.last_release_at)}`);
  const doubt = status.releases_in_doubt;
  say("in-doubt", doubt ? `${money(totals.in_doubt)} of it in doubt` : "earned, not yet paid");
  const lost = Number(totals.uncollectible) > 0;
  say("uncollectible", lost ? `${money(totals.uncollectible)} uncollectible` : "what payers can still use");
  at("uncollectible").classList.toggle("bad", lost);
  const accepted = status.events.accepted;
  say("events", money(accepted));
  const now = Date.parse(status.now);
  if (before && now > before.now && accepted >= before.accepted) {
    const rate = Math.round(((accepted - before.accepted) * 1000) / (now - before.now));
    say("rate", `${money(rate)} a second · ${money(status.events.duplicates)} duplicates`);
  }
  before = { now, accepted };
}

function showFlow(status) {
  const pill = at("flow");
  pill.dataset.word = status.flow.word;
  say("flow", status.flow.blocked || words(status.flow.word));
  const last = status.flow.last_event_at;
  say("since", `meterd ${status.version} · last event ${last ? ago(last) : "not since the start"}`);
  if (status.store.writable === false) banner("The disk is full: nothing is accepted until there is room.");
  else banner("");
}

function showAttention(status) {
  const items = [
    ...status.frozen.map((item) => [item.state, item]),
    ...status.in_doubt.filter((item) => item.state !== "escalated").map((item) => ["in doubt", item]),
    ...status.exhausted.map((item) => ["exhausted", item]),
    ...status.paused.map((item) => [item.state, item]),
  ];
  at("attention-card").hidden = items.length === 0;
  at("attention").replaceChildren(
    ...items.map(([kind, item]) => {
      const li = make("li");
      const line = make("p");
      line.append(make("span", `${kind} `, "word bad"), make("b", item.agreement), document.createTextNode(` ${item.reason}`));
      li.append(line);
      if (item.next) li.append(make("code", item.next));
      return li;
    }),
  );
}

function showChart(status) {
  points.push([Number(status.totals.accrued), Number(status.totals.released)]);
  if (points.length > POINTS_MAX) points.shift();
  const flat = points.flat();
  const low = Math.min(...flat);
  const span = Math.max(...flat) - low || 1;
  const step = 600 / Math.max(1, points.length - 1);
  const line = (place) =>
    points.map((pair, index) => `${(index * step).toFixed(1)},${(114 - ((pair[place] - low) / span) * 108).toFixed(1)}`).join(" ");
  at("chart").querySelector(".accrued").setAttribute("points", line(0));
  at("chart").querySelector(".released").setAttribute("points", line(1));
  say("chart-note", `the last ${points.length} looks, once a second`);
}

function used(agreement) {
  const total = Number(agreement.escrows[0].total);
  const bar = make("progress");
  bar.max = 1;
  bar.value = total ? Math.min(1, Math.max(0, 1 - Number(agreement.headroom ?? 0) / total)) : 0;
  if (bar.value >= 0.95) bar.className = "full";
  bar.title = `${agreement.escrows[0].total} USDC deposited`;
  bar.setAttribute("aria-label", `used of the deposit of ${agreement.id}`);
  return bar;
}

function showAgreements(page, status) {
  say("agreements-note", `${page.items.length} of ${status.agreements.total}`);
  rows(
    "agreements",
    page.items,
    (one) => [
      cell(make("b", one.id)),
      cell(one.plan),
      cell(state(one.state)),
      cell(money(one.accrued), "n"),
      cell(money(one.released), "n"),
      cell(money(one.unsettled), "n"),
      cell(money(one.headroom), "n"),
      cell(used(one)),
    ],
    "No agreement yet. Bind an escrow: meterd bind ESCROW --plan PLAN",
  );
}

function showReleases(page) {
  rows(
    "releases",
    page.items,
    (one) => [
      cell(clock(one.created_at)),
      cell(one.agreement ?? one.escrow),
      cell(money(one.amount), "n"),
      cell(words(one.why)),
      cell(state(one.status)),
    ],
    "No release yet. The first one follows when a threshold is reached.",
  );
}

function showSources(status) {
  rows(
    "sources",
    status.sources,
    (one) => {
      const word = state(one.connected ? "connected" : "away");
      word.title = one.error || one.warning || one.address;
      return [
        cell(make("b", one.name)),
        cell(word),
        cell(one.lag === null ? "–" : money(one.lag), "n"),
        cell(money(one.unacked), "n"),
      ];
    },
    "HTTP alone: POST /v1/events",
  );
}

async function showLetters(status) {
  say("letters-note", status.dead_letters ? `${money(status.dead_letters)} kept` : "");
  let items = [];
  let empty = "None. Every event could be priced.";
  if (status.dead_letters) {
    try {
      items = (await ask("/v1/dead-letters?limit=10")).items;
    } catch (error) {
      if (error.status !== 403) throw error;
      empty = "To see them takes a token with the scope admin.";
    }
  }
  rows("letters", items, (one) => [cell(one.id), cell(one.source), cell(words(one.reason)), cell(one.detail, "text")], empty);
}

function banner(text) {
  at("lost").hidden = !text;
  say("lost", text);
}

async function look() {
  const status = await ask("/v1/status");
  const [agreements, releases] = await Promise.all([
    ask(`/v1/agreements?limit=${ROWS_MAX}`),
    ask("/v1/releases?limit=15"),
  ]);
  showFlow(status);
  showTotals(status);
  showAttention(status);
  showChart(status);
  showAgreements(agreements, status);
  showReleases(releases);
  showSources(status);
  await showLetters(status);
}

function away(error) {
  if (error.status === 401 || error.status === 403) {
    at("door").hidden = false;
    banner(sessionStorage.getItem("token") ? error.message : "");
    return;
  }
  at("flow").dataset.word = "away";
  say("flow", "away");
  banner(error.status ? `The daemon answers: ${error.message}` : "The daemon does not answer; trying again.");
}

async function run() {
  try {
    if (!document.hidden) {
      await look();
      at("door").hidden = true;
    }
    wait = POLL_MS;
  } catch (error) {
    away(error);
    wait = Math.min(wait * 2, WAIT_MAX_MS);
  }
  clearTimeout(timer); // There is one timer, also when a token was given while a look was under way.
  timer = setTimeout(run, wait);
}

at("door").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", at("token").value.trim());
  at("token").value = "";
  clearTimeout(timer);
  run();
});

run();
