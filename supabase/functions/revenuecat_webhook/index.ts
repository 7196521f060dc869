// Takes RevenueCat's events and hands each to apply_billing_event, which books it once.
//
// RevenueCat sends as Authorization what its dashboard says: the value, to the letter, of
// REVENUECAT_WEBHOOK_AUTHORIZATION. It sends again, five times in some three hours, what is not
// answered with 200.

const [base, legacyKey] = ["SUPABASE_URL", "SUPABASE_SERVICE_ROLE_KEY"].map((n) => Deno.env.get(n));
const secretKeys = new Response(Deno.env.get("SUPABASE_SECRET_KEYS")).json().catch(() => null);
const key: string = (await secretKeys)?.default ?? legacyKey;
const expected = Deno.env.get("REVENUECAT_WEBHOOK_AUTHORIZATION")?.trim();
if (!base) throw new Error("SUPABASE_URL is not set");
if (!key) throw new Error("SUPABASE_SERVICE_ROLE_KEY is not set");
if (!expected) throw new Error("REVENUECAT_WEBHOOK_AUTHORIZATION is not set");
// A key of the new kind is no JWT, and is refused where one belongs.
const own = { apikey: key, ...(key.startsWith("sb_") ? {} : { authorization: `Bearer ${key}` }) };
// Two values are compared by their HMACs, which takes as long wherever they differ.
const hmac = { name: "HMAC", hash: "SHA-256" };
const random = crypto.getRandomValues(new Uint8Array(32));
const hmacKey = await crypto.subtle.importKey("raw", random, hmac, false, ["sign", "verify"]);
const bytes = (text: string) => new TextEncoder().encode(text);
const proof = await crypto.subtle.sign("HMAC", hmacKey, bytes(expected));

const refuse = (status: number, message: string, details: string, hint: string, headers = {}) =>
  Response.json({ code: `PT${status}`, message, details, hint }, { status, headers });
const invalid = (details: string, hint = "Check REVENUECAT_WEBHOOK_AUTHORIZATION.") =>
  refuse(400, "invalid_input", details, hint);
const onError = () => refuse(503, "unavailable", "no answer in time", "Send it again.");

Deno.serve({ onError }, async ({ method, headers, body }) => {
  if (method !== "POST") {
    return refuse(405, "method_not_allowed", method, "Use POST.", { allow: "POST" });
  }
  const given = bytes(headers.get("authorization") ?? "");
  if (!await crypto.subtle.verify("HMAC", hmacKey, proof, given)) {
    return invalid("Authorization: missing or wrong");
  }
  let json = new Blob();
  for await (const part of body ?? []) {
    json = new Blob([json, part]);
    if (json.size > 262144) return invalid("body: over 256 KiB", "Send less.");
  }
  const event = (await new Response(json).json().catch(() => null))?.event;
  if (!event?.id) return invalid("body: no event", "Send an event of RevenueCat's.");

  // What jsonb cannot hold, in an attribute that an app set, say, must not keep the event out.
  const content = JSON.stringify({ provider: "revenuecat", event }).replaceAll(
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
