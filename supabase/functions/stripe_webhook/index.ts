// Takes Stripe's events and hands each to apply_billing_event, which books it once.
//
// `Stripe-Signature: t=1796052000,v1=9f2c…` proves that Stripe sent the body, and when: v1 is the
// HMAC-SHA-256 of "t.body", and there is one for each secret that the endpoint has just now.
// STRIPE_WEBHOOK_SECRET may hold several, so that the next is known before the last one ends.
// Stripe sends again, for three days, what is not answered with 2xx.

const [base, legacyKey] = ["SUPABASE_URL", "SUPABASE_SERVICE_ROLE_KEY"].map((n) => Deno.env.get(n));
const secretKeys = new Response(Deno.env.get("SUPABASE_SECRET_KEYS")).json().catch(() => null);
const key: string = (await secretKeys)?.default ?? legacyKey;
const secrets = Deno.env.get("STRIPE_WEBHOOK_SECRET")?.match(/[^\s,]+/g);
if (!base) throw new Error("SUPABASE_URL is not set");
if (!key) throw new Error("SUPABASE_SERVICE_ROLE_KEY is not set");
if (!secrets) throw new Error("STRIPE_WEBHOOK_SECRET is not set");
// A key of the new kind is no JWT, and is refused where one belongs.
const own = { apikey: key, ...(key.startsWith("sb_") ? {} : { authorization: `Bearer ${key}` }) };
const hmac = { name: "HMAC", hash: "SHA-256" };
const imported = secrets.map((secret) =>
  crypto.subtle.importKey("raw", new TextEncoder().encode(secret), hmac, false, ["verify"])
);
const hmacKeys = await Promise.all(imported);

const refuse = (status: number, message: string, details: string, hint: string, headers = {}) =>
  Response.json({ code: `PT${status}`, message, details, hint }, { status, headers });
const invalid = (details: string, hint = "Check STRIPE_WEBHOOK_SECRET.") =>
  refuse(400, "invalid_input", details, hint);
const onError = () => refuse(503, "unavailable", "no answer in time", "Send it again.");

Deno.serve({ onError }, async ({ method, headers, body }) => {
  if (method !== "POST") {
    return refuse(405, "method_not_allowed", method, "Use POST.", { allow: "POST" });
  }
  const header = headers.get("stripe-signature") ?? "";
  const time = /(?:^|,)t=(\d+)(?:,|$)/.exec(header)?.[1];
  // Each costs a hash of the whole body, so nobody may send more than the few that Stripe does.
  const signatures = [...header.matchAll(/(?:^|,)v1=([0-9a-f]{64})(?=,|$)/g)].slice(0, 8)
    .map(([, hex]) => Uint8Array.from(hex.match(/../g)!, (byte) => parseInt(byte, 16)));
  if (!time || !signatures.length) return invalid("Stripe-Signature: missing or malformed");
  if (Math.abs(Date.now() / 1000 - Number(time)) > 300) {
    return invalid("Stripe-Signature: more than 300 seconds from now", "Sign it anew.");
  }
  let json = new Blob();
  for await (const part of body ?? []) {
    json = new Blob([json, part]);
    if (json.size > 262144) return invalid("body: over 256 KiB", "Send less.");
  }
  const signed = await new Blob([`${time}.`, json]).arrayBuffer();
  const verified = hmacKeys.flatMap((hmacKey) =>
    signatures.map((signature) => crypto.subtle.verify("HMAC", hmacKey, signature, signed))
  );
  if (!(await Promise.all(verified)).includes(true)) return invalid("Stripe-Signature: wrong");
  const event = await new Response(json).json().catch(() => null);
  if (!event?.id) return invalid("body: no event", "Send an event of Stripe's.");

  // What jsonb cannot hold, in a name that a customer typed, say, must not keep the event out.
  const content = JSON.stringify({ provider: "stripe", event }).replaceAll(
    /\\(u0000|ud[89a-f]..|.)/g,
    (escape, what) => what.length > 1 ? "\ufffd" : escape,
  );
  const reply = await fetch(`${base}/rest/v1/rpc/apply_billing_event`, {
    method,
    headers: { ...own, "content-type": "application/json" },
    body: content,
    signal: AbortSignal.timeout(10_000),
    redirect: "error",
  });
  const { outcome, ...refusal } = await reply.json();
  if (outcome) return Response.json({ outcome });
  // Only what the database says of the event goes back; all else is ours to mend.
  if (!/^PT4/.test(refusal.code)) throw new Error("unavailable");
  return Response.json(refusal, { status: reply.status });
});
