// Tells how a job stands, for apps that call `supabase.functions.invoke("get_job_status", ...)`: by
// POST with {job_id}, or by GET with ?job_id=. `supabase.rpc("get_job_status", ...)` is the shorter
// way: all this does is pass the caller's own credentials on to it, and hand its answer back.

const [base, anonKey] = ["SUPABASE_URL", "SUPABASE_ANON_KEY"].map((name) => Deno.env.get(name));
if (!base || !anonKey) throw new Error(`${base ? "SUPABASE_ANON_KEY" : "SUPABASE_URL"} is not set`);
const cors = {
  "access-control-allow-origin": "*",
  "access-control-allow-methods": "GET, POST",
  "access-control-allow-headers": "authorization, apikey, content-type, x-client-info, *",
  "access-control-expose-headers": "retry-after",
  "access-control-max-age": "86400",
  allow: "GET, POST, OPTIONS",
};
const refuse = (status: number, message: string, details: string, hint: string, headers = cors) =>
  Response.json({ code: `PT${status}`, message, details, hint }, { status, headers });
const pick = (from: Headers, ...names: string[]) =>
  Object.fromEntries([...from].filter(([name]) => names.includes(name)));
const wait = { ...cors, "retry-after": "5" };
const onError = () =>
  refuse(503, "unavailable", "no answer in time", "Try again in 5 seconds.", wait);

Deno.serve({ onError }, async ({ method, url, headers, body }) => {
  if (method === "OPTIONS") return new Response(null, { status: 204, headers: cors });
  if (!/^(GET|POST)$/.test(method)) return refuse(405, "method_not_allowed", method, "Use POST.");
  let text = "";
  for await (const part of body?.pipeThrough(new TextDecoderStream()) ?? []) {
    if ((text += part).length > 1000) break; // no job_id is that long
  }
  const sent = await new Response(text).json().catch(() => null);
  const id = sent?.job_id ?? new URL(url).searchParams.get("job_id");
  if (typeof id !== "string") return refuse(400, "invalid_input", "job_id: missing", "Send one.");
  const rpc = `${base}/rest/v1/rpc/get_job_status?${new URLSearchParams({ job_id: id })}`;
  const own = { apikey: anonKey, ...pick(headers, "apikey", "authorization") };
  const signal = AbortSignal.timeout(10_000);
  const reply = await fetch(rpc, { headers: own, signal, redirect: "error" });
  const content = await reply.text();
  const back = { ...cors, ...pick(reply.headers, "content-type", "cache-control", "retry-after") };
  // Neither a server on the way, nor a database that hung up (400 without a code) or cannot write,
  // says anything of the request.
  const cannot = /"code": ?"(0A000|25006)?"/;
  const away = reply.status < 500 ? cannot.test(content) : !content.includes('"PT503"');
  if (!reply.ok && away) throw new Error("unavailable");
  return new Response(content, { status: reply.status, headers: back });
});
