// Serve only what will be paid: ask meterd first, set the price aside, work, and tell it what was really used.
//
//     node gate.mjs ID [AGREEMENT [TOKENS [USED]]]
//
// ID names the request that is served: asked again with it, the hold is the same one and the usage counts once.
// TOKENS is the most that the work may use, USED what it used. Node 18 or newer, without any package.
//
// METERD_URL is where meterd listens (http://127.0.0.1:8787). METERD_TOKEN is a token with the scope "gate", where
// meterd wants one.

const [id, agreement = "customer-1", most = "1500", used = "1312"] = process.argv.slice(2);
if (!id) {
  console.error("usage: node gate.mjs ID [AGREEMENT [TOKENS [USED]]]");
  process.exit(2);
}
const url = process.env.METERD_URL ?? "http://127.0.0.1:8787";
const token = process.env.METERD_TOKEN;
const TIMEOUT_MS = 5_000;
const TRIES = 6;

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// One call, and again while nobody answers or it cannot be taken yet (429, 5xx). That is safe for each call here: a hold
// has a key, and a capture or a void that is said twice happens once.
async function call(path, body, key) {
  const headers = { "Content-Type": "application/json" };
  if (token) headers.Authorization = `Bearer ${token}`;
  if (key) headers["Idempotency-Key"] = key;
  for (let number = 1; ; number += 1) {
    // Not AbortSignal.timeout: its timer keeps no Node alive while a fetch is left without any end.
    const controller = new AbortController();
    const timer = setTimeout(() => controller.abort(new Error("no answer in time")), TIMEOUT_MS);
    try {
      const { signal } = controller;
      const told = { method: "POST", headers, body: JSON.stringify(body), signal };
      const answer = await fetch(`${url}${path}`, told);
      const json = await answer.json();
      if ((answer.status !== 429 && answer.status < 500) || number === TRIES) {
        return { status: answer.status, ...json };
      }
    } catch (error) {
      if (number === TRIES) throw error;
    } finally {
      clearTimeout(timer);
    }
    await sleep(200 * 2 ** number * Math.random());
  }
}

// 1. May this be served? With `hold` its price is set aside for so many seconds, so that a hundred requests at once
//    cannot all be served from the last cent. 402 is an answer: the deposit would not pay for it.
const asked = { agreement, meter: "tokens", quantity: most, hold: 60 };
const verdict = await call("/v1/authorize", asked, `gate-${id}`);
if (verdict.status === 402) {
  console.log(`not served: ${JSON.stringify(verdict)}`);
  process.exit(3);
}
if (verdict.status === 409) {
  console.log("served already: this hold was captured");
  process.exit(0);
}
if (verdict.status !== 200) {
  console.error(`meterd refused the request: ${verdict.detail}`);
  process.exit(1);
}

// 2. Work. (If it fails, POST /v1/holds/ID/void gives everything free again; so does time.)
const work = async () => used;

// 3. Tell what was really used: the hold becomes usage, the rest of it is free again.
const told = await call(`/v1/holds/${verdict.hold}/capture`, { quantity: await work() });
console.log(`served: ${told.accepted} accepted, ${told.duplicates} duplicates`);
process.exitCode = told.status === 200 && told.rejected.length === 0 ? 0 : 1;
