// Three free credits a day for whoever solves a captcha, and then the picture. A user without credits
// is refused by the database, so nobody gets around the captcha by calling the RPC.

const names = ["SUPABASE_URL", "SUPABASE_ANON_KEY", "SUPABASE_SERVICE_ROLE_KEY", "CAPTCHA_SECRET"];
const [base, anonKey, serviceKey, secret] = names.map((name) => {
  const value = Deno.env.get(name);
  if (!value) throw new Error(`${name} is not set`);
  return value;
});
const verifier = Deno.env.get("CAPTCHA_URL") ||
  "https://challenges.cloudflare.com/turnstile/v0/siteverify";
const cors = {
  "access-control-allow-origin": "*",
  "access-control-allow-headers": "authorization, apikey, content-type, x-client-info",
};
const refuse = (status: number, message: string, details: string, hint: string) =>
  Response.json({ code: `PT${status}`, message, details, hint }, { status, headers: cors });
const onError = () => refuse(503, "unavailable", "no answer in time", "Try again in 5 seconds.");

const send = (url: string, headers: Record<string, string>, content: object) =>
  fetch(url, {
    method: "POST",
    headers: { ...headers, "content-type": "application/json" },
    body: JSON.stringify(content),
    signal: AbortSignal.timeout(10_000),
  });

Deno.serve({ onError }, async (request) => {
  if (request.method === "OPTIONS") return new Response(null, { status: 204, headers: cors });
  const body = await request.json().catch(() => null);
  if (!body?.captcha) return refuse(400, "invalid_input", "captcha: missing", "Send one.");
  const { captcha, ...wish } = body;

  // Who calls is what Auth says of the token, never what the body says.
  const caller = { apikey: anonKey, authorization: request.headers.get("authorization") ?? "" };
  const known = await fetch(`${base}/auth/v1/user`, { headers: caller });
  if (!known.ok) return refuse(401, "not_authenticated", "token: no user", "Sign in again.");
  const { id: user_id } = await known.json();

  // Your own check.
  const verdict = await (await send(verifier, {}, { secret, response: captcha })).json();
  if (!verdict.success) return refuse(403, "captcha_failed", "captcha: wrong", "Solve another.");

  // What it is worth: three credits until tomorrow. The same external_id is granted once.
  const day = new Date().toISOString().slice(0, 10);
  const service = { apikey: serviceKey, authorization: `Bearer ${serviceKey}` };
  const granted = await send(`${base}/rest/v1/rpc/grant_credits`, service, {
    user_id,
    amount: 3,
    kind: "grant",
    external_id: `captcha:${user_id}:${day}`,
    expires_at: new Date(Date.now() + 86_400_000).toISOString(),
  });
  if (!granted.ok) throw new Error("unavailable");

  // The picture is asked for as the caller: the database checks, charges and queues as always.
  const reply = await send(`${base}/rest/v1/rpc/enqueue_generation`, caller, wish);
  return new Response(reply.body, {
    status: reply.status,
    headers: { ...cors, "content-type": "application/json" },
  });
});
