// The dashboard: listens to /v1/stream and reads afresh what an event says has changed.
// Texts from outside only ever become textContent. Money arrives as decimal text and is shown as text; it becomes a
// number only to place a point in the chart. What has not changed is not drawn again, so that focus stays where it is.

const PAGE = 25;
const ROWS_MAX = 500;
const POINTS_MAX = 600;
const READ_MS = 1000; // Read the figures once a second at most, however much happens,
const IDLE_MS = 10000; // and so often when nothing does.
const ECHO_MS = 2500; // The totals of the daemon may be a second old: read again when things are still.
const SILENCE_MS = 40000; // The stream has a sign of life every 15 seconds.
const RETRY_MS = [500, 1000, 2000, 4000];
const GOOD = new Set(["active", "confirmed", "flowing", "connected"]);
const BAD = new Set(["frozen", "exhausted", "escalated", "declined", "away", "late"]);
const QUIET = new Set(["closed", "void", "not_sent"]);
const OVER = new Set(["closed", "closing"]);

const points = [];
const shown = { agreements: PAGE, releases: PAGE, letters: PAGE };
const stale = new Set();
let agreements = [];
let plans = [];
let lastEvent = "";
let failures = 0;
let before = null;
let timer = 0;
let reading = false;
let locked = false;
let pending = null;
let listening = null;
let quiet = 0;
let echo = 0;

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

function button(text, label, act, kind) {
  const made = make("button", text, kind);
  made.type = "button";
  made.setAttribute("aria-label", label);
  made.addEventListener("click", act);
  return made;
}

const words = (text) => String(text).replaceAll("_", " ");

function state(word) {
  const kind = GOOD.has(word) ? "good" : BAD.has(word) ? "bad" : QUIET.has(word) ? "quiet" : "warn";
  return make("span", words(word), `word ${kind}`);
}

// At most six decimals, cut and never rounded; what was cut off stands in the title.
function money(text) {
  if (text === null || text === undefined) return "–";
  const [whole, decimals = ""] = String(text).split(".");
  const grouped = whole.replace(/\B(?=(\d{3})+$)/g, "\u202f");
  return decimals ? `${grouped}.${decimals.slice(0, 6)}` : grouped;
}

function amount(text) {
  const span = make("span", money(text));
  span.title = text === null ? "not known yet" : `${text} USDC`;
  return span;
}

function lasting(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 120) return `${Math.floor(seconds)} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.floor(seconds / 3600)} h` : `${money(Math.floor(seconds / 86400))} d`;
}

function ago(text) {
  if (!text) return "never";
  return `${lasting(Math.max(0, Math.round((Date.now() - Date.parse(text)) / 1000)))} ago`;
}

function when(text) {
  const time = make("time", ago(text));
  if (!text) return time;
  time.dateTime = text;
  time.title = text;
  return time;
}

function stack(...parts) {
  const box = make("div", undefined, "stack");
  box.append(...parts);
  return box;
}

// -- Rows: one for each key; a cell is replaced only when it says something else ------------------

function cell(content, kind) {
  const td = make("td", undefined, kind);
  td.append(content instanceof Node ? content : document.createTextNode(String(content)));
  return td;
}

function renew(old, fresh) {
  old.querySelectorAll("details").forEach((one, index) => {
    const same = fresh.querySelectorAll("details")[index];
    if (same) same.open = one.open;
  });
  if (old.isEqualNode(fresh)) return;
  const held = old.contains(document.activeElement) ? document.activeElement.tagName : "";
  old.replaceWith(fresh);
  if (held) fresh.querySelector(held)?.focus();
}

function rows(id, items, key, row, empty) {
  const body = at(id);
  const heads = [...body.parentElement.querySelectorAll("thead th")];
  const old = new Map([...body.children].map((tr) => [tr.dataset.key, tr]));
  const wanted = items.slice(0, ROWS_MAX).map((item) => {
    const name = `k${key(item)}`;
    const cells = row(item);
    cells.forEach((td, index) => { td.dataset.label = heads[index].textContent; });
    const tr = old.get(name) || make("tr");
    old.delete(name);
    tr.dataset.key = name;
    if (tr.children.length === 0) tr.append(...cells);
    else cells.forEach((td, index) => renew(tr.children[index], td));
    return tr;
  });
  if (wanted.length === 0) {
    const tr = make("tr");
    const td = cell(empty, "none");
    td.colSpan = heads.length;
    tr.append(td);
    wanted.push(tr);
  }
  for (const tr of [...body.children]) if (!wanted.includes(tr)) tr.remove();
  wanted.forEach((tr, index) => {
    if (body.children[index] !== tr) body.insertBefore(tr, body.children[index] || null);
  });
}

// -- Asking ---------------------------------------------------------------------------------------

function headers(more) {
  const token = sessionStorage.getItem("token");
  return token ? { ...more, Authorization: `Bearer ${token}` } : { ...more };
}

async function answered(response) {
  const body = await response.json().catch(() => ({}));
  if (response.ok) return body;
  const error = new Error(body.detail || response.statusText || `HTTP ${response.status}`);
  error.status = response.status;
  throw error;
}

async function ask(path, limit) {
  const query = limit ? `?limit=${limit}` : "";
  const signal = AbortSignal.timeout(10000);
  return answered(await fetch(path + query, { headers: headers(), cache: "no-store", signal }));
}

async function send(path, document) {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  const key = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  const more = { "Content-Type": "application/json", "Idempotency-Key": key };
  const body = JSON.stringify(document);
  const signal = AbortSignal.timeout(20000);
  return answered(await fetch(path, { method: "POST", headers: headers(more), body, signal }));
}

// -- Showing --------------------------------------------------------------------------------------

function banner(text) {
  at("lost").hidden = !text;
  say("lost", text);
}

function toast(text, bad) {
  at("said").hidden = false;
  at("said").classList.toggle("wrong", Boolean(bad));
  say("said", text);
  clearTimeout(quiet);
  quiet = setTimeout(() => { at("said").hidden = true; }, 12000);
}

function live(yes) {
  at("live").dataset.live = yes ? "yes" : "no";
  say("live", yes ? "live" : "not live");
}

function showStatus(status) {
  const { totals, flow } = status;
  for (const name of ["accrued", "released", "unsettled", "headroom"]) {
    say(name, money(totals[name]));
    at(name).title = `${totals[name]} USDC`;
  }
  at("flow").dataset.word = flow.word;
  say("flow", words(flow.word));
  say("since", `${status.version} · last event ${flow.last_event_at ? ago(flow.last_event_at) : "not since the start"}`);
  say("last-release", `last one ${ago(flow.last_release_at)}`);
  const doubt = status.releases_in_doubt;
  say("in-doubt", doubt ? `${money(totals.in_doubt)} of it in doubt` : "earned, not yet paid");
  const lost = /[1-9]/.test(totals.uncollectible);
  say("uncollectible", lost ? `${money(totals.uncollectible)} uncollectible` : "what payers can still use");
  at("uncollectible").classList.toggle("bad", lost);
  const accepted = status.events.accepted;
  say("events", money(accepted));
  const now = Date.parse(status.now);
  if (before && now > before.now && accepted >= before.accepted) {
    const pace = Math.round(((accepted - before.accepted) * 1000) / (now - before.now));
    say("rate", `${money(pace)} a second · ${money(status.events.duplicates)} duplicates`);
  }
  before = { now, accepted };
  showAttention(status);
  showChart(totals);
  rows("sources", status.sources, (source) => source.name, (source) => [
    cell(stack(make("b", source.name), make("span", source.address || source.kind, "quiet"))),
    cell(stack(state(source.connected ? "connected" : "away"), make("span", source.error || source.warning || "", "quiet"))),
    cell(source.lag === null ? "–" : money(source.lag), "n"),
    cell(source.unacked === null ? "–" : money(source.unacked), "n"),
  ], "Events come by HTTP alone.");
  const letters = status.dead_letters;
  say("letters-note", letters ? `${money(letters)} wait` : "none");
  const total = status.agreements.total;
  say("agreements-note", `${money(total)} in all`);
}

function showAttention(status) {
  const items = [
    ...status.frozen.map((item) => [item.state, item]),
    ...status.in_doubt.filter((item) => item.state !== "escalated").map((item) => ["in doubt", item]),
    ...status.exhausted.map((item) => ["exhausted", item]),
    ...status.paused.map((item) => [item.state, item]),
  ];
  if (status.flow.blocked) {
    items.unshift(["blocked", { agreement: "all agreements", reason: status.flow.blocked, next: status.flow.next }]);
  }
  for (const source of status.sources.filter((each) => !each.connected)) {
    items.push(["away", { agreement: source.name, reason: source.error || "the source is not connected", next: null }]);
  }
  const list = make("ul");
  for (const [kind, item] of items) {
    const li = make("li");
    const line = make("p");
    const name = item.agreement || "others";
    line.append(make("span", words(kind), "word bad"), " ", make("b", name), ` ${item.reason || ""}`);
    li.append(line);
    if (item.next) li.append(make("code", item.next));
    list.append(li);
  }
  at("attention-card").hidden = items.length === 0;
  const place = at("attention");
  const same = place.children.length === list.children.length
    && [...place.children].every((li, index) => li.isEqualNode(list.children[index]));
  if (!same) place.replaceChildren(...list.children);
}

function showChart(totals) {
  points.push({ at: Date.now(), accrued: Number(totals.accrued), released: Number(totals.released), said: totals });
  if (points.length > POINTS_MAX) points.shift();
  const first = points[0];
  const bottom = Math.min(...points.map((point) => Math.min(point.released, point.accrued)));
  const top = Math.max(...points.map((point) => Math.max(point.accrued, point.released)));
  const span = top - bottom || 1;
  const time = points.at(-1).at - first.at || 1;
  const place = (name) => points.map((point) => {
    const x = points.length === 1 ? 0 : ((point.at - first.at) / time) * 600;
    return `${x.toFixed(1)},${(134 - ((point[name] - bottom) / span) * 128).toFixed(1)}`;
  });
  const [accrued, released] = [place("accrued"), place("released")];
  const chart = at("chart");
  chart.querySelector("polyline.accrued").setAttribute("points", accrued.join(" "));
  chart.querySelector("polyline.released").setAttribute("points", released.join(" "));
  chart.querySelector("polygon").setAttribute("points", [...accrued, ...released.reverse()].join(" "));
  const label = `Accrued ${totals.accrued}, released ${totals.released}, unsettled ${totals.unsettled} USDC; `
    + `when this page was opened ${first.said.accrued} and ${first.said.released}`;
  chart.setAttribute("aria-label", label);
  say("chart-top", top.toFixed(4));
  say("chart-bottom", bottom.toFixed(4));
  say("chart-from", `${lasting(time / 1000)} ago`);
}

function showAgreements() {
  rows("agreements", agreements, (one) => one.id, (one) => {
    const name = button(one.id, `Usage of ${one.id}`, () => showUsage(one.id), "link");
    const who = [one.plan, one.payer].filter(Boolean).join(" · ");
    const frozen = one.state === "frozen";
    const verb = frozen ? "resume" : "freeze";
    const act = OVER.has(one.state) ? "" : button(frozen ? "Resume" : "Freeze", `${frozen ? "Resume" : "Freeze"} ${one.id}`,
      () => openAct(verb, one.id));
    return [
      cell(stack(name, make("span", who, "quiet"))),
      cell(stack(state(one.state), make("span", one.reason || "", "quiet"))),
      cell(amount(one.accrued), "n"),
      cell(amount(one.released), "n"),
      cell(amount(one.unsettled), "n"),
      cell(amount(one.headroom), "n"),
      cell(lasting(one.runway), "n"),
      cell(act, "act"),
    ];
  }, "No agreement yet. Bind an escrow: meterd bind ESCROW --plan PLAN");
}

function history(release) {
  const details = make("details");
  const summary = make("summary");
  summary.append(state(release.status));
  const list = make("ol", undefined, "history");
  for (const step of release.history) {
    const li = make("li");
    li.append(state(step.status), " ", when(step.at), step.detail ? ` ${step.detail}` : "");
    list.append(li);
  }
  details.append(summary, list);
  return details;
}

function showReleases(page) {
  at("releases-more").hidden = !page.next || shown.releases >= ROWS_MAX;
  rows("releases", page.items, (one) => one.id, (one) => [
    cell(when(one.created_at)),
    cell(one.agreement || one.escrow),
    cell(amount(one.amount), "n"),
    cell(words(one.why)),
    cell(history(one)),
  ], "Nothing was released yet.");
}

function payload(letter) {
  const details = make("details");
  details.append(make("summary", letter.detail || words(letter.reason)), make("pre", letter.payload));
  return details;
}

function showLetters(page) {
  at("letters-more").hidden = !page.next || shown.letters >= ROWS_MAX;
  rows("letters", page.items, (one) => one.id, (one) => [
    cell(String(one.id)),
    cell(when(one.received_at)),
    cell(one.source),
    cell(words(one.reason)),
    cell(payload(one)),
    cell(button("Replay", `Replay dead letter ${one.id}`, () => replay(one.id)), "act"),
  ], "None. Every event was understood.");
}

async function showUsage(id) {
  say("usage-title", `Usage of ${id}`);
  say("usage-note", "reading …");
  at("counters").replaceChildren();
  at("usage").showModal();
  try {
    const path = `/v1/agreements/${encodeURIComponent(id)}/usage`;
    const page = await ask(path, 200);
    say("usage-note", page.next ? "the first 200 counters; all of them: the API" : "by meter and rate card, since it was opened");
    const key = (one) => JSON.stringify([one.meter, one.dimensions, one.period, one.card]);
    rows("counters", page.items, key, (one) => [
      cell(one.meter),
      cell(Object.entries(one.dimensions).map(([name, value]) => `${name} ${value}`).join(", ") || "–"),
      cell(`${money(one.quantity)} ${one.unit || ""}`.trim(), "n"),
      cell(money(one.events), "n"),
      cell(amount(one.accrued), "n"),
    ], "Nothing was used yet.");
  } catch (error) {
    say("usage-note", error.message);
  }
}

// -- Acting ---------------------------------------------------------------------------------------

function openAct(verb, id) {
  pending = { verb, id };
  say("act-title", `${verb === "freeze" ? "Freeze" : "Resume"} ${id}`);
  say("act-note", verb === "freeze" ? "Nothing more is released; usage still counts." : "Goes on from what the service shows.");
  say("act-error", "");
  at("act-reason").value = "";
  at("act").showModal();
}

async function act(event) {
  event.preventDefault();
  const { verb, id } = pending;
  at("act-go").disabled = true;
  try {
    await send(`/v1/agreements/${encodeURIComponent(id)}/${verb}`, { reason: at("act-reason").value.trim() });
    at("act").close();
    toast(verb === "freeze" ? `${id} is frozen.` : `${id} goes on.`);
  } catch (error) {
    say("act-error", error.message);
  } finally {
    at("act-go").disabled = false;
    soon("agreements");
  }
}

async function replay(number) {
  try {
    const answer = await send(`/v1/dead-letters/${number}/replay`, {});
    const [wrong] = answer.rejected;
    if (wrong) toast(`Dead letter ${number} is rejected again: ${wrong.detail || words(wrong.reason)}`, true);
    else toast(`Dead letter ${number} is counted.`);
  } catch (error) {
    toast(`Dead letter ${number}: ${error.message}`, true);
  }
  soon("letters", "agreements");
}

function showPlan() {
  const plan = plans[at("quote-plan").selectedIndex];
  if (!plan) return;
  at("quote-rate").replaceChildren(...plan.rates.map((rate) => {
    const kind = Object.values(rate.where).join(" ");
    return make("option", kind ? `${rate.meter} (${kind})` : rate.meter);
  }));
  say("plan-note", `${words(plan.pattern)}: ${plan.rates.map((rate) => `${rate.meter} ${rate.words}`).join("; ")}`);
}

async function price(event) {
  event.preventDefault();
  const plan = plans[at("quote-plan").selectedIndex];
  const rate = plan?.rates[at("quote-rate").selectedIndex];
  if (!rate) return;
  const used = { meter: rate.meter, quantity: at("quote-quantity").value.trim(), dimensions: rate.where };
  const answer = at("quote-answer");
  try {
    const quoted = await send("/v1/quote", { plan: plan.name, usage: [used] });
    const lines = quoted.lines.flatMap((line) => line.working).map((text) => make("span", text, "quiet"));
    answer.replaceChildren(stack(make("b", `${quoted.total} USDC`), ...lines));
  } catch (error) {
    answer.replaceChildren(make("span", error.message, "bad"));
  }
}

// -- Reading --------------------------------------------------------------------------------------

function soon(...what) {
  what.forEach((name) => stale.add(name));
  if (timer === 0 && !reading) timer = setTimeout(read, Math.min(READ_MS, what.includes("all") ? 0 : 300));
}

async function read() {
  timer = 0;
  if (reading || locked) return;
  reading = true;
  const began = Date.now();
  const all = stale.has("all");
  const wanted = (name) => all || stale.has(name);
  const [wantAgreements, wantReleases, wantLetters] = ["agreements", "releases", "letters"].map(wanted);
  stale.clear();
  try {
    showStatus(await ask("/v1/status"));
    if (wantAgreements) {
      const page = await ask("/v1/agreements", shown.agreements);
      agreements = page.items;
      at("agreements-more").hidden = !page.next || shown.agreements >= ROWS_MAX;
      showAgreements();
    }
    if (wantReleases) showReleases(await ask("/v1/releases", shown.releases));
    if (all) {
      const known = JSON.stringify(plans);
      plans = (await ask("/v1/plans")).items;
      if (JSON.stringify(plans) !== known) {
        at("quote-plan").replaceChildren(...plans.map((plan) => make("option", plan.name)));
        showPlan();
      }
    }
    if (wantLetters) await readLetters();
    if (at("live").dataset.live === "yes") banner("");
  } catch (error) {
    if (all) stale.add("all");
    failed(error);
  }
  reading = false;
  if (locked) return;

  clearTimeout(timer);
  timer = 0;
  if (stale.size) timer = setTimeout(read, Math.max(READ_MS - (Date.now() - began), 200));
}

async function readLetters() {
  try {
    showLetters(await ask("/v1/dead-letters", shown.letters));
  } catch (error) {
    if (error.status !== 403) throw error;
    rows("letters", [], String, String, "Reading them needs a token with the scope admin.");
  }
}

function failed(error) {
  if (error.status === 401 || error.status === 403) {
    locked = true;
    at("door").hidden = false;
    at("main").hidden = true;
    live(false);
    banner(sessionStorage.getItem("token") ? error.message : "");
    at("token").focus();
  } else if (error.status) banner(`meterd answers: ${error.message}`);
  else banner("meterd does not answer; what you see is old. Trying again … On its machine: meterd status");
}

// -- Listening ------------------------------------------------------------------------------------

function heard(kind, data) {
  clearTimeout(echo);
  echo = setTimeout(() => soon("status"), ECHO_MS);
  if (kind === "start" || kind === "reset") soon("all");
  else if (kind === "accrual") {
    const known = agreements.find((one) => one.id === data.agreement);
    if (known) {
      for (const name of ["events", "accrued", "released", "unsettled", "in_doubt", "headroom"]) known[name] = data[name];
      showAgreements();
      soon("status");
    } else soon("agreements");
  } else if (kind === "release") soon("releases", "agreements");
  else if (kind === "state") soon("agreements");
  else if (kind === "dead_letters") soon("letters");
  else if (kind === "source") soon("status");
}

function take(block) {
  const fields = {};
  for (const line of block.split("\n")) {
    const colon = line.indexOf(": ");
    if (colon > 0) fields[line.slice(0, colon)] = line.slice(colon + 2);
  }
  if (fields.id) lastEvent = fields.id;
  if (fields.event) heard(fields.event, JSON.parse(fields.data || "{}"));
}

async function listen() {
  listening = new AbortController();
  let watch = setTimeout(() => listening.abort(), SILENCE_MS);
  try {
    const more = lastEvent ? { "Last-Event-ID": lastEvent } : {};
    const response = await fetch("/v1/stream", { headers: headers(more), cache: "no-store", signal: listening.signal });
    if (!response.ok) await answered(response);
    live(true);
    failures = 0;
    soon("all"); // What was missed is told, and what only time changes is read.
    const reader = response.body.getReader();
    const decoder = new TextDecoder();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      clearTimeout(watch);
      watch = setTimeout(() => listening.abort(), SILENCE_MS);
      const blocks = (rest + decoder.decode(value, { stream: true })).split("\n\n");
      rest = blocks.pop();
      blocks.forEach(take);
    }
    throw new TypeError("the stream ended");
  } catch (error) {
    clearTimeout(watch);
    live(false);
    failed(error);
  }
  if (!locked) setTimeout(listen, RETRY_MS[Math.min(failures++, RETRY_MS.length - 1)]);
}

at("door").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", at("token").value.trim());
  at("token").value = "";
  at("door").hidden = true;
  at("main").hidden = false;
  locked = false;
  banner("");
  listen();
});
at("act-form").addEventListener("submit", act);
at("act-cancel").addEventListener("click", () => at("act").close());
at("usage-close").addEventListener("click", () => at("usage").close());
at("quote").addEventListener("submit", price);
at("quote-plan").addEventListener("change", showPlan);
for (const name of Object.keys(shown)) {
  document.getElementById(`${name}-more`).addEventListener("click", () => {
    shown[name] = Math.min(shown[name] + PAGE, ROWS_MAX);
    soon(name);
  });
}
setInterval(() => soon("status"), IDLE_MS);
setInterval(() => {
  for (const time of document.querySelectorAll("time[datetime]")) time.textContent = ago(time.dateTime);
}, 5000);
listen();
