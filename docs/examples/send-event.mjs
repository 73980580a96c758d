// Tell meterd what was used, from Node 18 or newer, without any package.
//
//     node send-event.mjs ID [AGREEMENT]
//
// ID names the piece of work, and every event's id is made of it. That is what makes an event count once: send the
// same ids again, as often as you like, and they are duplicates. So take an id that your work has already.
//
// METERD_URL is where meterd listens (http://127.0.0.1:8787). METERD_TOKEN is a token with the scope "ingest", where
// meterd wants one.

const [id, agreement = "customer-1"] = process.argv.slice(2);
if (!id) {
  console.error("usage: node send-event.mjs ID [AGREEMENT]");
  process.exit(2);
}
const url = process.env.METERD_URL ?? "http://127.0.0.1:8787";
const token = process.env.METERD_TOKEN;
const TIMEOUT_MS = 5_000;
const PATIENCE_MS = 300_000; // A restart or a full disk takes minutes; then a person should look.

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// Send events until meterd has them, and say what became of each.
//
// 200 comes after the commit. No answer, 429 or 5xx says nothing, so the same events are sent again: those that had
// arrived are duplicates then. Any other status is a mistake in the request; sending it again would not help.
async function send(events) {
  const body = JSON.stringify(events); // Made once: the same ids in every try.
  const headers = { "Content-Type": "application/json" };
  if (token) headers.Authorization = `Bearer ${token}`;
  const giveUp = Date.now() + PATIENCE_MS;
  for (let wait = 200; ; wait = Math.min(2 * wait, 15_000)) {
    let answer;
    // Not AbortSignal.timeout: its timer keeps no Node alive, and a fetch whose connection was closed at once may be
    // left without any end, so that the process would end in the middle of this.
    const controller = new AbortController();
    const timer = setTimeout(() => controller.abort(new Error("no answer in time")), TIMEOUT_MS);
    try {
      const { signal } = controller;
      answer = await fetch(`${url}/v1/events`, { method: "POST", headers, body, signal });
      const text = await answer.text();
      if (answer.ok) return JSON.parse(text);
      if (answer.status !== 429 && answer.status < 500) {
        throw Object.assign(new Error(`meterd refused the request: ${text}`), { final: true });
      }
    } catch (error) {
      if (error.final || Date.now() > giveUp) throw error;
    } finally {
      clearTimeout(timer);
    }
    if (Date.now() > giveUp) throw new Error(`meterd has not taken ${id} within ${PATIENCE_MS} ms`);
    const asked = Number(answer?.headers.get("Retry-After"));
    await sleep(asked > 0 ? Math.min(asked * 1000, 60_000) : wait * (0.5 + Math.random()));
  }
}

// A quantity with decimals is best a text: then no float ever touches it.
const result = await send([
  { id: `${id}-1`, agreement, meter: "tokens", quantity: 400, dimensions: { kind: "output" } },
  { id: `${id}-2`, agreement, meter: "tokens", quantity: "0.125" },
]);
console.log(JSON.stringify(result));

// An event that cannot be counted disturbs no other: meterd keeps it with its reason until a person has repaired that.
for (const { id: event, reason, detail } of result.rejected) console.error(`${event}: ${reason}: ${detail}`);
process.exitCode = result.rejected.length > 0 ? 1 : 0;
