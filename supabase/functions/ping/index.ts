// Warms the path to the database, for apps that call `supabase.functions.invoke("ping")`.
// `supabase.rpc("ping")` is the shorter way: all this does is call it and hand its answer back. It
// needs no token, so it passes none on.

const [base, anonKey] = ["SUPABASE_URL", "SUPABASE_ANON_KEY"].map((name) => Deno.env.get(name));
if (!base || !anonKey) throw new Error(`${base ? "SUPABASE_ANON_KEY" : "SUPABASE_URL"} is not set`);
const cors = {
  "access-control-allow-origin": "*",
  "access-control-allow-methods": "GET, HEAD, POST",
  "access-control-allow-headers": "authorization, apikey, content-type, x-client-info, *",
  "access-control-expose-headers": "retry-after",
  "access-control-max-age": "86400",
  allow: "GET, HEAD, POST, OPTIONS",
};
const refuse = (status: number, message: string, details: string, hint: string, headers = cors) =>
  Response.json({ code: `PT${status}`, message, details, hint }, { status, headers });
const pick = (from: Headers, ...names: string[]) =>
  Object.fromEntries([...from].filter(([name]) => names.includes(name)));
const wait = { ...cors, "retry-after": "5" };
const onError = () =>
  refuse(503, "unavailable", "no answer in time", "Try again in 5 seconds.", wait);

Deno.serve({ onError }, async ({ method, headers }) => {
  if (method === "OPTIONS") return new Response(null, { status: 204, headers: cors });
  if (!/^(GET|HEAD|POST)$/.test(method)) {
    return refuse(405, "method_not_allowed", method, "Use GET.");
  }
  const own = { apikey: headers.get("apikey") ?? anonKey };
  const signal = AbortSignal.timeout(10_000);
  const rpc = `${base}/rest/v1/rpc/ping`;
  const reply = await fetch(rpc, { headers: own, signal, redirect: "error" });
  const back = { ...cors, ...pick(reply.headers, "content-type", "cache-control", "retry-after") };
  const content = await reply.text();
  // Neither a server on the way, nor a database that hung up (400 without a code) or cannot write,
  // says anything of the request.
  const cannot = /"code": ?"(0A000|25006)?"/;
  const away = reply.status < 500 ? cannot.test(content) : !content.includes('"PT503"');
  if (!reply.ok && away) throw new Error("unavailable");
  return new Response(method === "HEAD" ? null : content, { status: reply.status, headers: back });
});
