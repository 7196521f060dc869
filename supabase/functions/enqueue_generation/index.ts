// Queues a generation, for apps that call `supabase.functions.invoke("enqueue_generation", ...)`.
// `supabase.rpc("enqueue_generation", ...)` is the shorter way: all this does is pass the caller's
// own credentials and body on to it, and hand its answer back.

const [base, anonKey] = ["SUPABASE_URL", "SUPABASE_ANON_KEY"].map((name) => Deno.env.get(name));
if (!base || !anonKey) throw new Error(`${base ? "SUPABASE_ANON_KEY" : "SUPABASE_URL"} is not set`);
const cors = {
  "access-control-allow-origin": "*",
  "access-control-allow-methods": "POST",
  "access-control-allow-headers": "authorization, apikey, content-type, x-client-info, *",
  "access-control-expose-headers": "retry-after",
  "access-control-max-age": "86400",
  allow: "POST, OPTIONS",
};
const refuse = (status: number, message: string, details: string, hint: string, headers = cors) =>
  Response.json({ code: `PT${status}`, message, details, hint }, { status, headers });
const pick = (from: Headers, ...names: string[]) =>
  Object.fromEntries([...from].filter(([name]) => names.includes(name)));
const wait = { ...cors, "retry-after": "5" };
const lost = "no answer in time: it may have been queued, so repeat it with its idempotency_key";
const onError = () => refuse(503, "unavailable", lost, "Try again in 5 seconds.", wait);

Deno.serve({ onError }, async ({ method, headers, body }) => {
  if (method === "OPTIONS") return new Response(null, { status: 204, headers: cors });
  if (method !== "POST") return refuse(405, "method_not_allowed", method, "Use POST.");
  let json = new Blob();
  for await (const part of body ?? []) {
    json = new Blob([json, part], { type: "application/json" });
    if (json.size > 65536) return refuse(400, "invalid_input", "body: over 64 KiB", "Send less.");
  }
  const rpc = `${base}/rest/v1/rpc/enqueue_generation`;
  const own = { apikey: anonKey, ...pick(headers, "apikey", "authorization") };
  const signal = AbortSignal.timeout(10_000);
  const reply = await fetch(rpc, { method, headers: own, body: json, signal, redirect: "error" });
  const content = await reply.text();
  const names = ["content-type", "cache-control", "retry-after"];
  const back: Record<string, string> = { ...cors, ...pick(reply.headers, ...names) };
  // Neither a server on the way, nor a database that hung up (400 without a code) or cannot write,
  // says anything of the request.
  const cannot = /"code": ?"(0A000|25006)?"/;
  const away = reply.status < 500 ? cannot.test(content) : !content.includes('"PT503"');
  if (!reply.ok && away) throw new Error("unavailable");
  back["retry-after"] &&= back["retry-after"].replace(/^0, /, ""); // PostgREST's own
  return new Response(content, { status: reply.status, headers: back });
});
